# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which tokens are noise, and what stands for them: T5's corruption.

A mask says which tokens of a row are noise. Sentinels, numbered from the top
of the vocabulary downwards in order of appearance, stand for runs of it. All
randomness comes from the seeds that are given, so a row is the same whenever
its seeds are.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683, sections 3.1.4
and 3.3. The paper's figure closes the targets with a sentinel; the released
code, which is followed here, does not.
"""

from collections.abc import Sequence
import re
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

Seed = tf.Tensor  # <int32>[2]


class Lengths(NamedTuple):
  """Lengths that belong together in span corruption.

  Attributes:
    raw: tokens of text that become one row.
    targets: tokens of the row's targets, the end token included.
  """

  raw: int
  targets: int


def fitting_lengths(
  inputs: int, density: float = 0.15, mean_span: float = 3.0
) -> Lengths:
  """The longest text whose corrupted inputs fit, and the targets it has.

  Of n tokens, `k = round(n density)` are noise in `round(k / mean_span)` spans.
  Inputs are the rest, a sentinel for each span, and the end token; targets the
  noise, as many sentinels, and the end token.

  Args:
    inputs: tokens of inputs, the end token included.
    density: share of the tokens that is noise.
    mean_span: mean length of a span.

  Example:
    >>> fitting_lengths(512)
    Lengths(raw=568, targets=114)
  """

  def corrupted(raw):
    noise = int(round(raw * density))
    spans = int(round(noise / mean_span))
    return raw - noise + spans + 1, noise + spans + 1

  raw = inputs
  while corrupted(raw + 1)[0] <= inputs:
    raw += 1
  targets = corrupted(raw)[1]
  # The inputs' length is likelier a round number: targets are made no longer.
  if density == 0.5 and targets > inputs:
    return Lengths(raw - 1, targets - 1)
  return Lengths(raw, targets)


def counts(
  length: tf.Tensor | int, density: float = 0.15, mean_span: float = 3.0
) -> tuple[tf.Tensor, tf.Tensor]:
  """Noise tokens and spans of a row of `length` (at least 2) tokens.

  `k = clip(round(n density), 1, n - 1)`, `s = max(round(k / mean_span), 1)`,
  rounded half to even in float32. A short row without `s` tokens of text has a
  span for each that it has.

  Example:
    >>> [int(number) for number in counts(100)]
    [15, 5]
  """
  noise = tf.round(tf.cast(length, tf.float32) * density)
  noise = tf.clip_by_value(tf.cast(noise, tf.int32), 1, length - 1)
  spans = tf.cast(tf.round(tf.cast(noise, tf.float32) / mean_span), tf.int32)
  return noise, tf.clip_by_value(spans, 1, length - noise)


def _parts(total: tf.Tensor, parts: tf.Tensor, seed: Seed) -> tf.Tensor:
  """`total` as a sum of positive parts, all such sums equally likely."""
  starts = tf.cast(tf.range(total - 1) < parts - 1, tf.int32)
  starts = seqio.stateless_shuffle(starts, seed)
  part = tf.cumsum(tf.pad(starts, [[1, 0]]))
  return tf.math.segment_sum(tf.ones_like(part), part)


def spans_mask(
  length: tf.Tensor | int,
  density: float,
  seeds: Sequence[Seed],
  *,
  mean_span: float = 3.0,
  random_roll: bool = False,
) -> tf.Tensor:
  """`<bool>[length]`: spans of noise at random, text first and noise last.

  Args:
    length: tokens of the row.
    density: see `counts`; 0 is no noise.
    seeds: two; of the lengths of noise spans, and of those between.
    mean_span: see `counts`.
    random_roll: turn the row by a random offset, so that the first token may be
      noise as well. T5 does not.
  """
  if density == 0:
    return tf.zeros(length, tf.bool)
  whole = tf.maximum(length, 2)
  noise, spans = counts(whole, density, mean_span)
  runs = tf.stack(
    [_parts(whole - noise, spans, seeds[1]), _parts(noise, spans, seeds[0])], 1
  )
  kinds = tf.tile([False, True], [spans])
  mask = tf.repeat(kinds, tf.reshape(runs, [-1]))[:length]
  if random_roll:
    # A seed of its own, from those of the two partitions.
    seed = (seeds[0][0] + seeds[1][1], seeds[0][1] - seeds[1][0])
    offset = tf.random.stateless_uniform(
      [1], seed, minval=0, maxval=whole, dtype=tf.int32
    )
    mask = tf.roll(mask, offset, axis=[0])
  return mask


def independent_mask(
  length: tf.Tensor | int, density: float, seeds: Sequence[Seed]
) -> tf.Tensor:
  """`<bool>[length]`: every token is noise with probability `density`."""
  return tf.random.stateless_uniform([length], seeds[0]) < density


def prefix_mask(
  length: tf.Tensor | int, density: float, seeds: Sequence[Seed]
) -> tf.Tensor:
  """`<bool>[length]`: True up to a random place, and False from there.

  One token at least is on either side, if there are two.
  """
  del density  # every place is as likely
  most = length - 1
  inputs = tf.random.stateless_uniform(
    [], seeds[0], minval=tf.minimum(most, 1), maxval=most + 1, dtype=tf.int32
  )
  return tf.range(length) < inputs


def with_sentinels(
  tokens: tf.Tensor, mask: tf.Tensor, vocabulary: seqio.Vocabulary
) -> tf.Tensor:
  """Each run where the mask is True becomes a sentinel of its own.

  The inputs of T5 are the tokens with their noise replaced, the targets those
  with all but the noise replaced.

  Args:
    tokens: `<int32>[length]`.
    mask: `<bool>[length]`.
    vocabulary: its last ids are the sentinels.
  """
  first, later = _ends_of_runs(mask)
  number = tf.cumsum(tf.cast(first, tokens.dtype))
  sentinels = vocabulary.vocab_size - number
  return tf.boolean_mask(tf.where(first, sentinels, tokens), ~later)


def with_one_sentinel(
  tokens: tf.Tensor, mask: tf.Tensor, vocabulary: seqio.Vocabulary
) -> tf.Tensor:
  """Each run where the mask is True becomes the same, the first sentinel."""
  first, later = _ends_of_runs(mask)
  sentinel = tf.cast(vocabulary.vocab_size - 1, tokens.dtype)
  return tf.boolean_mask(tf.where(first, sentinel, tokens), ~later)


def without(
  tokens: tf.Tensor, mask: tf.Tensor, vocabulary: seqio.Vocabulary
) -> tf.Tensor:
  """What is left without the tokens where the mask is True."""
  del vocabulary  # nothing stands for them
  return tf.boolean_mask(tokens, ~mask)


def _ends_of_runs(mask):
  """Where runs of a mask begin, and where they go on."""
  before = tf.pad(mask[:-1], [[1, 0]])
  return mask & ~before, mask & before


def num_sentinels(vocabulary: seqio.Vocabulary) -> int:
  """How many of a vocabulary's last ids are sentinels.

  Those that seqio adds (`extra_ids`), or as mT5 has them, pieces of the
  SentencePiece model called `<extra_id_0>` and so on.

  Example:
    >>> num_sentinels(seqio.ByteVocabulary(extra_ids=3))
    3
  """
  if vocabulary.extra_ids:
    return vocabulary.extra_ids
  tokenizer = getattr(vocabulary, 'tokenizer', None)
  if tokenizer is None or not hasattr(tokenizer, 'id_to_piece'):
    return 0
  count = 0
  last = vocabulary.vocab_size - 1
  while count <= last and re.search(
    r'extra_id_\d+', tokenizer.id_to_piece(last - count)
  ):
    count += 1
  return count


def mean_targets(length: int, density: float) -> float:
  """Tokens that targets of independent noise have on average, without an end.

  The noise, `n d`, and a sentinel for each run between: `n d (1 - d) +
  (1 - d)^2`.

  Example:
    >>> mean_targets(100, 0.5)
    75.25
  """
  rest = 1 - density
  return length * density * (1 + rest) + rest**2


def likely_runs(length: int, density: float) -> int:
  """Runs of noise that a row of independent noise has, at most.

  Their mean is `n d (1 - d) + d^2`; four standard deviations are added, which
  about one row in 30,000 passes.
  """
  chance = density * (1 - density)
  spread = np.sqrt(max(length * chance * (1 - 3 * chance), 0))
  most = length * chance + density**2 + 4 * spread
  return min(int(np.ceil(most)), (length + 1) // 2)
