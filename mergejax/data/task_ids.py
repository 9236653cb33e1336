# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which task every target of a batch is of, through mixing and packing.

The number of the task stands beside every token of the targets, and is cut,
packed and padded with them: rows are the same as without it.
"""

import seqio
import tensorflow as tf

from mergejax.core import errors

# In an example, and in a batch: 1, 2, ... in the order of `names`, 0 padding.
FEATURE = 'task_ids'
BATCH_FEATURE = 'decoder_task_ids'

_SPEC = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)


def names(provider: seqio.Task | seqio.Mixture) -> list[str]:
  """The tasks of a mixture in the order of their numbers: by name."""
  return sorted(task.name for task in seqio.get_subtasks(provider))


class _Numbered(seqio.Mixture):
  """A flat mixture of the same draws, whose examples have a number."""

  def get_task_dataset(
    self, task, output_feature_keys, sequence_length=None, split='train',
    use_cached=False, shuffle=True, seed=None, shard_info=None,
    num_epochs=None, trim_output_features=True, try_in_mem_cache=True,
  ):  # fmt: skip
    # What seqio's own does in a step before is done in this one.
    number = tf.constant(names(self).index(task.name) + 1, tf.int32)

    @tf.autograph.experimental.do_not_convert
    def one(row):
      kept = {name: row[name] for name in row if name in output_feature_keys}
      return {**kept, FEATURE: tf.fill([tf.size(row['targets'])], number)}

    dataset = task.get_dataset(
      sequence_length, split, use_cached, shuffle, seed=seed,
      shard_info=shard_info, num_epochs=num_epochs,
      trim_output_features=trim_output_features,
      try_in_mem_cache=try_in_mem_cache,
    )  # fmt: skip
    return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def numbered(provider: seqio.Task | seqio.Mixture) -> seqio.Mixture:
  """The mixture with `FEATURE` in its examples; it is not registered.

  A mixture of mixtures becomes one of tasks at their rates in it, from which
  seqio draws just the same.
  """
  if isinstance(provider, seqio.Task):
    return _Numbered(provider.name, [(provider, 1.0)])
  # Drawn as seqio draws those of the mixture itself.
  pairs = [(task, provider.get_rate(task)) for task in provider.tasks]
  return _Numbered(provider.name, pairs, sample_fn=provider._sample_fn)


class _Keeping:
  """A feature converter that keeps the numbers beside the targets."""

  def _convert_example(self, features):
    converted = super()._convert_example(features)
    return {**converted, BATCH_FEATURE: features[FEATURE]}

  def get_model_feature_lengths(self, task_feature_lengths):
    lengths = super().get_model_feature_lengths(task_feature_lengths)
    return {**lengths, BATCH_FEATURE: task_feature_lengths['targets']}


class _EncoderDecoder(_Keeping, seqio.EncDecFeatureConverter):
  TASK_FEATURES = {**seqio.EncDecFeatureConverter.TASK_FEATURES, FEATURE: _SPEC}
  MODEL_FEATURES = {
    **seqio.EncDecFeatureConverter.MODEL_FEATURES,
    BATCH_FEATURE: _SPEC,
  }


class _LanguageModel(_Keeping, seqio.LMFeatureConverter):
  TASK_FEATURES = {**seqio.LMFeatureConverter.TASK_FEATURES, FEATURE: _SPEC}
  MODEL_FEATURES = {
    **seqio.LMFeatureConverter.MODEL_FEATURES,
    BATCH_FEATURE: _SPEC,
  }


_CONVERTERS = {'encoder_decoder': _EncoderDecoder, 'lm': _LanguageModel}


def converter(kind: str, pack: bool) -> seqio.FeatureConverter:
  """A converter of `kind` whose batches have `BATCH_FEATURE`.

  Raises:
    ConfigError: a kind that has none: rows of `'prefix_lm'` hold inputs too.
  """
  if kind not in _CONVERTERS:
    raise errors.ConfigError(
      f'Batches of {kind!r} features do not tell their tasks apart, those of '
      f'{" and ".join(map(repr, _CONVERTERS))} do: leave per_task out.'
    )
  return _CONVERTERS[kind](pack=pack)


def lengths_with(lengths: dict[str, int]) -> dict[str, int]:
  """Tokens per feature, those of the numbers included."""
  return {**lengths, FEATURE: lengths['targets']}
