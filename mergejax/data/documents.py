# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Documents of tokens to rows: pieces of long ones, joined, cut to a length.

Draws and their order are those of T5's preprocessors.
"""

import seqio
import tensorflow as tf

Dataset = tf.data.Dataset

# Nothing here has control flow that AutoGraph would have to make of Python's,
# and looking for it takes a third of the time that a pipeline takes to open.
_unconverted = tf.autograph.experimental.do_not_convert

# A longer document gives one piece of so many tokens an epoch.
PIECE = 65_536
# Documents that are joined end to end, so that fewer rows are short.
JOINED = 128


def random_piece(dataset: Dataset, most: int = PIECE) -> Dataset:
  """One piece of each document: the text in parts of `most`, one at random."""

  @seqio.map_over_dataset(num_seeds=1)
  @_unconverted
  def piece(example, seed):
    tokens = example['targets']
    size = tf.size(tokens)
    parts = tf.cast(tf.math.ceil(size / most), tf.int32)
    number = tf.random.stateless_uniform(
      [], seed, minval=0, maxval=parts, dtype=tf.int32
    )
    return {'targets': tokens[number * most : (number + 1) * most]}

  return piece(_not_empty(dataset))


def joined(dataset: Dataset, documents: int = JOINED) -> Dataset:
  """So many documents end to end, and so on; nothing stands between them."""
  dataset = dataset.map(
    _unconverted(lambda example: {'targets': example['targets']})
  )

  @_unconverted
  def join(batch):
    tokens = batch['targets'].flat_values
    # A pad token, which some vocabularies make of odd text, ends no row.
    return {'targets': tf.boolean_mask(tokens, tokens != 0)}

  return dataset.ragged_batch(documents).map(
    join, num_parallel_calls=tf.data.AUTOTUNE
  )


def rows(dataset: Dataset, length: int) -> Dataset:
  """Tokens cut into rows of `length`; the last of each may be shorter."""

  # T5 has a seed for rows of random lengths: it is taken here, so that those
  # of the steps after this one are the same.
  @seqio.map_over_dataset(num_seeds=1)
  @_unconverted
  def cut(example, seed):
    del seed
    tokens = example['targets']
    starts = tf.range(0, tf.size(tokens), length)
    # Padded rows of a tensor are taken apart many times faster than ragged.
    padded = tf.pad(tokens, [[0, tf.size(starts) * length - tf.size(tokens)]])
    sizes = tf.minimum(tf.size(tokens) - starts, length)
    return tf.reshape(padded, [-1, length]), sizes

  return (
    cut(_not_empty(dataset))
    .unbatch()
    .map(_unconverted(lambda row, size: {'targets': row[:size]}))
  )


def _not_empty(dataset):
  return dataset.filter(
    _unconverted(lambda example: tf.size(example['targets']) > 0)
  )
