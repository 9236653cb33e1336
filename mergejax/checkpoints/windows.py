# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Stretches of arrays that lie in chunks: no more is read than a few rows.

What is asked for is a stretch of the flat leaf. It lies in chunks that go over
whole axes, so the rows that these chunks hold are read together, and kept
until others are asked for: pieces that follow each other cost one reading.
"""

import abc
from collections.abc import Iterator
import math
import threading
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.core import errors
from mergejax.core import typing


class ChunkedStore(base.ParamStore):
  """A store whose arrays tensorstore can open."""

  @abc.abstractmethod
  def _open_array(self, path: typing.Path) -> Any:
    """The opened array of a leaf; None if it does not lie in chunks."""

  def _array(self, path):
    opened = vars(self).setdefault('_opened', {})
    if path not in opened:
      opened[path] = self._open_array(path)
    return opened[path]

  def _rows(self, path) -> int | None:
    """Rows of a leaf that its chunks hold together; None: all of them."""
    shape = self.specs()[path].shape
    array = self._array(path) if shape else None
    if array is None:
      return None
    return int(array.chunk_layout.read_chunk.shape[0] or shape[0])

  def window_bytes(self, path: typing.Path) -> int:
    spec, rows = self.specs()[path], self._rows(path)
    if rows is None or rows >= spec.shape[0]:
      return spec.nbytes
    return rows * spec.nbytes // spec.shape[0]

  def read_into(self, path: typing.Path, start: int, out: np.ndarray) -> None:
    rows, shape = self._rows(path), self.specs()[path].shape
    if rows is None or rows >= shape[0] or not out.size:
      super().read_into(path, start, out)
      return
    width = math.prod(shape[1:])
    kept = vars(self).setdefault('_window', threading.local())
    for first, last in _groups(start, start + out.size, rows * width):
      window = first // (rows * width)
      if getattr(kept, 'of', None) != (path, window):
        kept.of = None
        kept.rows = self._read_rows(path, window * rows, (window + 1) * rows)
        kept.of = path, window
      at = window * rows * width
      out[first - start : last - start] = kept.rows[first - at : last - at]

  def read_slices(
    self, path: typing.Path, axis: int, first: int, stop: int
  ) -> np.ndarray:
    if self._array(path) is None:
      return super().read_slices(path, axis, first, stop)
    return self._read_array(path, (*[slice(None)] * axis, slice(first, stop)))

  def has_slices(self, path: typing.Path, axis: int) -> bool:
    array, count = self._array(path), self.specs()[path].shape[axis]
    if array is None:
      return False
    return 2 * (array.chunk_layout.read_chunk.shape[axis] or count) <= count

  def _read_rows(self, path, first, stop):
    """<dtype>[n], the numbers of rows that are there."""
    stop = min(stop, self.specs()[path].shape[0])
    return self._read_array(path, slice(first, stop)).reshape(-1)

  def _read_array(self, path, where):
    try:
      return np.asarray(self._array(path)[where].read().result())
    except Exception as error:  # tensorstore raises many kinds
      raise errors.CheckpointError(
        f'{self.name}: {path} cannot be read ({errors.first_line(error)}).'
      ) from error


def _groups(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
  """Cuts a stretch where multiples of a size lie in it."""
  while start < stop:
    end = min(stop, (start // size + 1) * size)
    yield start, end
    start = end
