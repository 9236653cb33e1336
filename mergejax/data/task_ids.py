# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which task every target of a batch is of, through mixing and packing.

The number of the task stands beside every token of the targets, and is cut,
packed and padded with them: rows are the same as without it.
"""

from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import converters

# In an example, and in a batch: 1, 2, ... in the order of `names`, 0 padding.
FEATURE = 'task_ids'
BATCH_FEATURE = 'decoder_task_ids'

_SPEC = converters.Spec(dtype=tf.int32)


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


def kept(
  kind: str, lengths: Mapping[str, int], *, targets: bool, rows: Sequence[str]
) -> converters.Extra:
  """What batches of a `numbered` mixture say of their tasks.

  Args:
    kind: as of `stream.SeqioStream`.
    lengths: tokens per feature.
    targets: `BATCH_FEATURE`, `<int32>[rows, length]`.
    rows: names of `<int32>[rows]` each, the number of a row's task, from 0: what
      adapters read. Rows must not be packed.

  Raises:
    ConfigError: a kind that has none: rows of `'prefix_lm'` hold inputs too.
  """
  if kind not in ('encoder_decoder', 'lm'):
    raise errors.ConfigError(
      f'Batches of {kind!r} features do not tell their tasks apart, those of '
      "'encoder_decoder' and 'lm' do: leave per_task out, and adapters that tell "
      'rows apart.'
    )
  scalar = converters.Spec(dtype=tf.int32, rank=0)
  arrays = {name: scalar for name in rows}

  def make(features):
    numbers = features[FEATURE]
    of_targets = {BATCH_FEATURE: numbers} if targets else {}
    return {**of_targets, **{name: numbers[0] - 1 for name in rows}}

  if targets:
    arrays[BATCH_FEATURE] = _SPEC
  length = lengths['targets']
  return converters.Extra(
    FEATURE, _SPEC, length, arrays, dict.fromkeys(arrays, length), make
  )
