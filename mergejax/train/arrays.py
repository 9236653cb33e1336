# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A stream over arrays in memory: for notebooks and small data."""

from collections.abc import Mapping

import numpy as np

from mergejax import errors


class ArrayStream:
  """Shuffled batches of equally long arrays, forever.

  The order depends on the seed and the epoch alone, so the position is one
  number.

  Example:
    >>> stream = ArrayStream({'x': np.arange(4)}, batch_size=2)
    >>> next(stream)['x'].shape
    (2,)
  """

  def __init__(
    self, arrays: Mapping[str, np.ndarray], batch_size: int, *, seed: int = 0
  ):
    """Opens a stream over `{name: array[examples, ...]}`.

    Raises:
      UserError: arrays of different lengths, or fewer examples than one batch.
    """
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) != 1 or min(lengths) < batch_size:
      raise errors.UserError(
        f'Batches of {batch_size} need arrays of one common length of at '
        f'least that, not of {sorted(lengths)}.'
      )
    self._arrays = dict(arrays)
    self._batch_size = batch_size
    self._seed = seed
    self._per_epoch = lengths.pop() // batch_size
    self._position = 0

  def __next__(self) -> dict[str, np.ndarray]:
    epoch, batch = divmod(self._position, self._per_epoch)
    size = len(next(iter(self._arrays.values())))
    order = np.random.default_rng([self._seed, epoch]).permutation(size)
    rows = order[batch * self._batch_size :][: self._batch_size]
    self._position += 1
    return {name: array[rows] for name, array in self._arrays.items()}

  def state(self) -> bytes:
    """The position."""
    return str(self._position).encode()

  def restore(self, state: bytes) -> None:
    """Continues from a saved position."""
    self._position = int(state)
