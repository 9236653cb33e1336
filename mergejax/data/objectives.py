# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training without labels as seqio preprocessors: T5's, prefix LM and LM.

Each takes documents as tokens, `{'targets': <int32>[tokens]}`, and yields rows
of `inputs` and `targets` without end tokens, which
`seqio.preprocessors.append_eos_after_trim` adds. A task of your own:

    seqio.TaskRegistry.add(
      'c4_spans', source=..., output_features=features.encoder_decoder(vocab),
      preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        objectives.span_corruption,
        seqio.preprocessors.append_eos_after_trim,
      ])

A random piece of every document is taken, documents are joined, cut to rows,
and corrupted anew in every epoch. Draws are those of tf.data's seeds: equal to
those of T5's own preprocessors, and a stream continues with them exactly.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683, section 3.
"""

from collections.abc import Callable, Mapping
import functools
import logging

import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import documents as documents_lib
from mergejax.data import noise

Dataset = tf.data.Dataset
Features = Mapping[str, seqio.Feature]
Sizes = Mapping[str, int] | None


def span_corruption(
  dataset: Dataset,
  sequence_length: Sizes,
  output_features: Features,
  *,
  density: float = 0.15,
  mean_span: float = 3.0,
  documents: int | None = documents_lib.JOINED,
  random_roll: bool = False,
) -> Dataset:
  """T5's denoising: spans of noise become sentinels, the targets say them.

  Args:
    dataset: documents, `{'targets': tokens}`.
    sequence_length: tokens of `inputs` and `targets`, end tokens included;
      T5's are 512 and 114.
    output_features: of the task; the vocabulary's last ids are the sentinels.
    density: share of the tokens that is noise; T5's 0.15.
    mean_span: mean length of a span; T5's 3.
    documents: how many are joined at a time; None cuts each by itself, as T5
      does with `merge_examples_to_reduce_padding=False`.
    random_roll: see `noise.spans_mask`.

  Returns:
    Rows of at most these lengths. `noise.fitting_lengths` says of how much
    text.

  Raises:
    ConfigError: lengths that are missing, targets shorter than the noise, more
      spans than there is text between, or too few sentinels. It is raised
      before anything is read.
  """
  lengths = _lengths(sequence_length, 'inputs', 'targets')
  _check_share(density)
  if not mean_span >= 1:
    raise errors.ConfigError(
      f'The mean length of a span is 1 token or more, not {mean_span}.'
    )
  fitting = noise.fitting_lengths(lengths['inputs'], density, mean_span)
  if lengths['targets'] < fitting.targets:
    raise errors.ConfigError(
      f'Span corruption of {lengths["inputs"]} inputs with noise density '
      f'{density} and mean span {mean_span} has {fitting.targets} targets, the '
      f'end token included; there is room for {lengths["targets"]}. Make the '
      f'length of targets {fitting.targets} or more, or that of inputs less.'
    )
  spans = _spans(fitting.raw, density, mean_span)
  # Where a row is turned its noise may be cut in two.
  _check_sentinels(output_features, spans + random_roll)
  dataset = documents_lib.random_piece(dataset)
  if documents:
    dataset = documents_lib.joined(dataset, documents)
  return denoise(
    documents_lib.rows(dataset, fitting.raw), output_features, density,
    mask=functools.partial(
      noise.spans_mask, mean_span=mean_span, random_roll=random_roll
    ),
  )  # fmt: skip


def independent_denoising(
  dataset: Dataset,
  sequence_length: Sizes,
  output_features: Features,
  *,
  density: float = 0.15,
  documents: int | None = documents_lib.JOINED,
) -> Dataset:
  """Denoising where every token is noise by itself ("i.i.d." in the paper).

  Rows have as many tokens as `inputs` have room for. Targets that are longer
  than theirs are cut, which a warning tells if most are: about `2 density` of
  the inputs are needed.

  Args:
    dataset: as in `span_corruption`.
    sequence_length: likewise.
    output_features: likewise.
    density: chance of a token to be noise.
    documents: as in `span_corruption`.

  Raises:
    ConfigError: missing lengths, a density that is no share, or too few
      sentinels for all but about one row in 30,000.
  """
  lengths = _lengths(sequence_length, 'inputs', 'targets')
  _check_share(density)
  raw = _room(lengths, output_features, 'inputs')
  _check_sentinels(output_features, noise.likely_runs(raw, density))
  needed = noise.mean_targets(raw, density) + output_features['targets'].add_eos
  _tell_cuts(
    'independent_denoising', lengths['targets'], round(needed), 'about'
  )
  dataset = documents_lib.random_piece(dataset)
  if documents:
    dataset = documents_lib.joined(dataset, documents)
  return denoise(
    documents_lib.rows(dataset, raw),
    output_features,
    density,
    mask=noise.independent_mask,
  )


def prefix_lm(
  dataset: Dataset, sequence_length: Sizes, output_features: Features
) -> Dataset:
  """Text cut in two at a random place: the inputs, and how they go on.

  Rows have as many tokens as `inputs` have room for; give `targets` as many:
  if they have less, a warning tells that the longest are cut.

  Args:
    dataset: as in `span_corruption`.
    sequence_length: likewise.
    output_features: likewise.

  Raises:
    ConfigError: missing lengths.
  """
  lengths = _lengths(sequence_length, 'inputs', 'targets')
  raw = _room(lengths, output_features, 'inputs')
  needed = raw - 1 + output_features['targets'].add_eos
  _tell_cuts('prefix_lm', lengths['targets'], needed, 'up to')
  # What is "noise" here is the prefix: dropped from the targets.
  return denoise(
    documents_lib.rows(documents_lib.random_piece(dataset), raw), output_features, 0.5,
    mask=noise.prefix_mask,
    inputs=lambda tokens, mask, vocab: noise.without(tokens, ~mask, vocab),
    targets=noise.without,
  )  # fmt: skip


def language_model(
  dataset: Dataset,
  sequence_length: Sizes,
  output_features: Features,
  *,
  documents: int | None = documents_lib.JOINED,
) -> Dataset:
  """Rows of text as `targets` alone.

  `tasks.add_text_task` leaves no token out and counts bytes, which evaluation
  in bits per byte needs; this is for mixtures with tasks that do neither.

  Args:
    dataset: as in `span_corruption`.
    sequence_length: tokens of `targets`.
    output_features: of the task.
    documents: as in `span_corruption`.

  Raises:
    ConfigError: no length of targets.
  """
  lengths = _lengths(sequence_length, 'targets')
  dataset = documents_lib.random_piece(dataset)
  if documents:
    dataset = documents_lib.joined(dataset, documents)
  return documents_lib.rows(dataset, _room(lengths, output_features, 'targets'))


# name in gin and in tasks -> the preprocessor.
OBJECTIVES: Mapping[str, Callable[..., Dataset]] = {
  'span_corruption': span_corruption,
  'independent_denoising': independent_denoising,
  'prefix_lm': prefix_lm,
  'language_model': language_model,
}


def makes_rows(task: seqio.Task) -> bool:
  """Whether a task's rows are cut to their lengths by one of `OBJECTIVES`.

  Asked for longer rows, such a task gives longer ones: how long an example is
  "by itself" is no question.
  """
  found = [getattr(step, 'func', step) for step in task.preprocessors]
  return any(step in OBJECTIVES.values() for step in found)


def denoise(
  dataset: Dataset,
  output_features: Features,
  density: float,
  *,
  mask: Callable[..., tf.Tensor],
  inputs: Callable[..., tf.Tensor] = noise.with_sentinels,
  targets: Callable[..., tf.Tensor] | None = None,
) -> Dataset:
  """Corrupts rows: `{'targets': tokens}` -> `{'inputs', 'targets'}`.

  Args:
    dataset: rows.
    output_features: of the task.
    density: of the noise.
    mask: `(length, density, seeds) -> <bool>[length]`, True where noise is.
    inputs: `(tokens, mask, vocabulary) -> tokens`.
    targets: likewise, of the same mask; by default all but the noise becomes
      sentinels.
  """
  vocabulary = output_features['targets'].vocabulary

  @seqio.map_over_dataset(num_seeds=1)
  @tf.autograph.experimental.do_not_convert  # there is nothing to convert
  def corrupt(example, seed):
    tokens = example['targets']
    # The first of T5's six; the others are for corruptions that draw, too.
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
    is_noise = mask(tf.size(tokens), density, seeds=seeds)
    if targets is None:
      wanted = noise.with_sentinels(tokens, ~is_noise, vocabulary)
    else:
      wanted = targets(tokens, is_noise, vocabulary)
    return {'inputs': inputs(tokens, is_noise, vocabulary), 'targets': wanted}

  return corrupt(dataset)


# Checks ---------------------------------------------------------------------


def _lengths(sequence_length, *names):
  missing = [name for name in names if not (sequence_length or {}).get(name)]
  if missing:
    raise errors.ConfigError(
      f'The rows of this objective are cut to the length of '
      f'{" and ".join(missing)}, which is not given: lengths='
      f'{dict(sequence_length or {})}.'
    )
  return sequence_length


def _room(lengths, output_features, name):
  """Tokens of text that fit, the end token left out."""
  raw = lengths[name] - output_features[name].add_eos
  if raw < 1 + (name == 'inputs'):
    raise errors.ConfigError(
      f'The length of {name}, {lengths[name]}, has no room for text and an end '
      'token.'
    )
  return raw


@functools.cache  # a run makes its rows several times
def _tell_cuts(objective, room, needed, about):
  if room < needed:
    logging.warning(
      'Targets of %s have %s %s tokens, the end token included, and room for '
      '%s: what is over is cut.', objective, about, needed, room,
    )  # fmt: skip


def _check_share(density):
  if not 0 < density < 1:
    raise errors.ConfigError(
      f'The noise density is a share between 0 and 1, not {density}.'
    )


def _spans(raw, density, mean_span):
  """Spans of a row of `raw` tokens; raises if no text would be between them."""
  count = int(tf.round(tf.cast(raw, tf.float32) * density))
  count = min(max(count, 1), raw - 1)
  spans = max(int(tf.round(tf.cast(count, tf.float32) / mean_span)), 1)
  if raw - count < spans:
    raise errors.ConfigError(
      f'Of {raw} tokens, {count} would be noise (density {density}) in {spans} '
      f'spans (of {mean_span} on average), but only {raw - count} are left to '
      'stand between them: lower the density, or make the spans longer.'
    )
  return spans


def _check_sentinels(output_features, needed):
  vocabulary = output_features['targets'].vocabulary
  count = noise.num_sentinels(vocabulary)
  if count < needed:
    raise errors.ConfigError(
      f'A row has up to {needed} spans of noise, each with a sentinel, and the '
      f'vocabulary ({type(vocabulary).__name__} of {vocabulary.vocab_size} '
      f'ids) has {count} sentinels. Give it more: '
      f'features.vocabulary(extra_ids={max(needed, 100)}), or shorter rows.'
    )
