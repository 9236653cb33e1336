# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A seqio source over local files: shuffled whole, sampled by row number."""

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np
import seqio
import tensorflow as tf

from mergejax.core import checksums
from mergejax.core import errors
from mergejax.data import rows as rows_lib

# Files of up to so many bytes are held in memory, and so checked from end to
# end before anything else is done. The rows of a larger one are read one by
# one, and a bad row is found when its turn comes. Both are shuffled whole.
HELD_BYTES = 1 << 28
# Rows that are read together.
_CHUNK = 16


class RowSource(seqio.DataSource):
  """Rows of one local file a split, as `{column: string}`.

  Shuffling is over the whole file, whatever its size and however it is
  sorted, in another order each epoch. The order is a permutation that is
  computed and not drawn from a buffer, so a saved position does not hold the
  file.
  """

  def __init__(
    self,
    files: Mapping[str, pathlib.Path],
    sums: Mapping[str, str],
    wanted: Sequence[str],
    *,
    identity: str,
    making: str,
    example_a_row: bool,
  ):
    """Says what is read; nothing is read yet.

    Args:
      files: `{split: file}`.
      sums: `{split: sha256}` of the files.
      wanted: names of the columns to give.
      identity: digest of the files and of everything that is made of them.
      making: digest of the latter alone.
      example_a_row: whether the task gives one example for every row, and not
        the pieces of documents.
    """
    super().__init__(splits=files, performs_internal_shuffling=True)
    self.files = dict(files)
    self.wanted = tuple(wanted)
    self.identity = identity
    self.making = making
    self.example_a_row = example_a_row
    self._sums = sums
    self._open: dict[str, rows_lib.Rows] = {}
    self._held: dict[str, dict[str, tf.Tensor]] = {}
    self._numbers: dict[str, np.ndarray] = {}

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def list_shards(self, split: str) -> Sequence[str]:
    return [str(self.files[split])]

  def rows(self, split: str) -> rows_lib.Rows:
    """The rows of a split's file, opened and checked once.

    Raises:
      UserError: a column that the file lacks, a bad row, or a file that was
        changed after the task was made.
    """
    if split not in self._open:
      path = self.files[split]
      if checksums.SUMS.of(path) != self._sums[split]:
        raise errors.DataError(
          f'{path} was changed after its task was registered. Start again.'
        )
      found = rows_lib.Rows(path)
      found.require(self.wanted)
      if found.sizes().sum() <= HELD_BYTES:
        columns = _columns(found, range(len(found)), self.wanted)
        self._held[split] = {
          name: tf.constant(column, tf.string)
          for name, column in zip(self.wanted, columns)
        }
      self._open[split] = found
    return self._open[split]

  def only(self, split: str, numbers: np.ndarray) -> 'RowSource':
    """The same source with some rows of a split, in the given order."""
    other = RowSource(
      self.files, self._sums, self.wanted, identity=self.identity,
      making=self.making, example_a_row=self.example_a_row,
    )  # fmt: skip
    other._open, other._held = self._open, self._held
    other._numbers = self._numbers | {split: np.asarray(numbers, np.int64)}
    return other

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused,
  ) -> tf.data.Dataset:
    """Rows in the file's order, or in an order of their own every epoch."""
    del unused
    found = self.rows(split)
    numbers = self._numbers.get(split)
    count = len(found) if numbers is None else len(numbers)

    def fetch(places):
      return _columns(found, places, self.wanted)

    def rows_at(places):
      if numbers is not None:
        places = tf.gather(numbers, places)
      if split in self._held:
        columns = self._held[split]
        return {name: tf.gather(columns[name], places) for name in self.wanted}
      columns = tf.numpy_function(
        fetch, [places], [tf.string] * len(self.wanted), stateful=False
      )
      for column in columns:
        column.set_shape([None])
      return dict(zip(self.wanted, columns))

    # Nothing here has control flow for AutoGraph to look for.
    @tf.autograph.experimental.do_not_convert
    def epoch(*drawn):
      def read(places):
        if drawn:
          key = tf.stack([drawn[0], tf.constant(0, tf.int64)])
          last = tf.constant(count - 1, tf.int64)
          places = tf.random.experimental.index_shuffle(places, key, last)
        return rows_at(places)

      places = tf.data.Dataset.range(count)
      if shard_info is not None:
        places = places.shard(shard_info.num_shards, shard_info.index)
      places = places.batch(_CHUNK)
      return places.map(read, num_parallel_calls=tf.data.AUTOTUNE).unbatch()

    if not shuffle:
      return epoch()
    draw = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    return draw.take(1).flat_map(epoch)


def _columns(rows, numbers, wanted):
  """Some rows as an array of bytes for each wanted column."""
  values = [rows.fields(int(number), wanted) for number in numbers]
  return [
    np.array([row[i] for row in values], object) for i in range(len(wanted))
  ]
