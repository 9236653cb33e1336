# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A stream over arrays in memory: for notebooks and small data."""

from collections.abc import Mapping
import functools
import hashlib
import json

import numpy as np

from mergejax.core import errors


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
      raise errors.ConfigError(
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

  def __str__(self) -> str:
    return f'the arrays {", ".join(self._arrays)}'

  @functools.cached_property
  def _identity(self):
    """What fixes the batches: their size, the seed, the arrays' content."""
    digest = hashlib.sha256()
    for name, array in sorted(self._arrays.items()):
      array = np.ascontiguousarray(array)
      digest.update(f'{name} {array.dtype.str} {array.shape}'.encode())
      digest.update(array.tobytes())
    return {
      'batch_size': self._batch_size,
      'seed': self._seed,
      'arrays': digest.hexdigest()[:16],
    }

  def state(self) -> bytes:
    """The position."""
    return json.dumps({'position': self._position, **self._identity}).encode()

  def restore(self, state: bytes) -> None:
    """Continues from a saved position.

    Raises:
      UserError: a position in other arrays, or in other batches of them.
    """
    saved = json.loads(state)
    if not isinstance(saved, dict):
      saved = {'position': saved}
    position = saved.pop('position')
    differing = errors.differences(saved, self._identity)
    if differing:
      raise errors.ConfigError(
        'The saved position is one in other data, or in other batches of the '
        f'same:\n{errors.listed(differing)}\nContinue with what was saved, or '
        'begin anew in another folder.'
      )
    self._position = position
