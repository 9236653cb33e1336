# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Streams made of numbered parts, which any number of processes can share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import numpy as np

from mergejax.core import errors


class PartsStream:
  """Batches of several streams, read together and joined.

  Parts are numbered over all processes: experts, or shares of one batch. Each
  keeps a position of its own, so a run can go on in another number of processes
  as if nothing had happened, whoever reads which part then.

  Example:
    >>> from mergejax.training import arrays
    >>> part = lambda i: arrays.ArrayStream({'x': np.full(4, i)}, 2)
    >>> next(PartsStream({0: part(0), 1: part(1)}))['x']
    array([0, 0, 1, 1])
  """

  def __init__(
    self,
    parts: Mapping[int, Any],
    *,
    join: Callable[[Sequence[np.ndarray]], np.ndarray] = np.concatenate,
  ):
    """Reads the parts of this process.

    Args:
      parts: `{number: stream}`, in the order of their rows.
      join: of the arrays of the parts; `np.stack` gives a leading axis.
    """
    self._parts = dict(parts)
    self._join = join

  def __next__(self) -> dict[str, np.ndarray]:
    batches = [next(stream) for stream in self._parts.values()]
    return {
      name: self._join([batch[name] for batch in batches])
      for name in batches[0]
    }

  def __str__(self) -> str:
    return ', '.join(sorted({str(part) for part in self._parts.values()}))

  def state(self) -> bytes:
    """The positions of the parts of this process."""
    return flax.serialization.msgpack_serialize(
      {str(number): part.state() for number, part in self._parts.items()}
    )

  def restore(self, state: bytes) -> None:
    """Continues every part from its position."""
    self.gather([state])

  def gather(self, states: Sequence[bytes]) -> None:
    """Continues from what all processes of an earlier run saved.

    Raises:
      UserError: the position of a part is in none of them.
    """
    positions = {}
    for state in states:
      positions.update(flax.serialization.msgpack_restore(state))
    missing = [n for n in self._parts if str(n) not in positions]
    if missing:
      raise errors.ConfigError(
        f'No position was saved of the parts {missing} of the data; there are '
        f'{sorted(positions, key=int)}. The run was begun with another number '
        'of experts or shares of a batch.'
      )
    for number, part in self._parts.items():
      part.restore(positions[str(number)])


class IterableStream:
  """Batches of any iterable; its position is how many were taken.

  Continuing skips as many of a fresh iterable, so this suits what gives the
  same batches each time.
  """

  def __init__(self, batches: Iterable[Mapping[str, Any]]):
    self._batches = iter(batches)
    self._taken = 0

  def __next__(self) -> Mapping[str, Any]:
    try:
      batch = next(self._batches)
    except StopIteration:
      raise errors.DataError(
        f'The batches ended after {self._taken}: ask for fewer steps, or give '
        'a stream without end, such as training.arrays.ArrayStream(arrays, '
        'batch_size).'
      ) from None
    self._taken += 1
    return batch

  def __str__(self) -> str:
    return 'the batches'

  def state(self) -> bytes:
    """The position."""
    return str(self._taken).encode()

  def restore(self, state: bytes) -> None:
    """Takes what an earlier run took."""
    while self._taken < int(state):
      next(self)


class WholeStream:
  """A stream of which every process gives the same, whole batches.

  So any process continues from what any process saved, in any number.
  """

  def __init__(self, stream: Any):
    self._stream = stream

  def __next__(self) -> Mapping[str, Any]:
    return next(self._stream)

  def __str__(self) -> str:
    return str(self._stream)

  def state(self) -> bytes:
    """The position."""
    return self._stream.state()

  def restore(self, state: bytes) -> None:
    """Continues from a saved position."""
    self._stream.restore(state)

  def gather(self, states: Sequence[bytes]) -> None:
    """Continues from what all processes of an earlier run saved."""
    self._stream.restore(states[0])


def of(batches: Any, *, whole: bool = False) -> Any:
  """A stream with a position, of a stream or of any iterable of batches.

  Args:
    batches: either.
    whole: every process gives the same batches, see `WholeStream`.
  """
  stream = batches
  if not all(hasattr(stream, n) for n in ('state', 'restore', '__next__')):
    stream = IterableStream(batches)
  if whole and not hasattr(stream, 'gather'):
    stream = WholeStream(stream)
  return stream


def restore(stream: Any, states: Sequence[bytes]) -> None:
  """Continues a stream from what every process of an earlier run saved.

  Args:
    stream: the stream of this process. One that other processes can take over
      has a method `gather(states)`; any other is continued by as many processes
      as saved it.
    states: one a process, in their order.

  Raises:
    UserError: another number of processes, and a stream without `gather`.
  """
  if hasattr(stream, 'gather'):
    stream.gather(states)
  elif len(states) == jax.process_count():
    stream.restore(states[jax.process_index()])
  else:
    raise errors.ConfigError(
      f'This run was saved by {len(states)} process(es), and its data cannot '
      f'be continued by {jax.process_count()}: start {len(states)}.'
    )
