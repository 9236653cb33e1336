# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging one leaf piece by piece: first passes that add up, then one call.

A leaf never has to be in memory whole. First passes without ranks are sums over
pieces, those with ranks are brought to counts of pieces by `ranks`. Then the
whole method runs on each piece in one compiled program.
"""

from collections.abc import Callable, Iterator
import functools
import itertools
import math
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax.core import errors
from mergejax.merging import engine
from mergejax.merging import finite
from mergejax.merging import given
from mergejax.merging.disk import plans
from mergejax.merging.disk import ranks as ranks_lib
from mergejax.methods import base as base_lib
from mergejax.methods import masks

# One element in so many is sampled to find a bracket around a rank.
_SAMPLE = 32
# Pieces are padded to one of these sizes, so that few programs do.
_SIZES = (65536, plans.PIECE)


class Piece(NamedTuple):
  """`count` elements of a leaf from flat position `start`, as `shape`."""

  number: int
  start: int
  count: int
  shape: tuple[int, ...]


def cut(task: plans.Task) -> Iterator[Piece]:
  """All pieces of a parameter that is merged in pieces, in order."""
  size, shape = task.spec.size, task.spec.shape
  if task.settings and task.settings.method.view == 'unit':
    # Whole units; a vector is one.
    width = size // shape[0] if len(shape) > 1 else size
    count = size // width
    rows = max(1, min(count, plans.PIECE // width))
    for number, row in enumerate(range(0, count, rows)):
      length = min(rows, count - row) * width
      yield Piece(number, row * width, length, (rows, width))
    return
  for number, start in enumerate(range(0, size, plans.PIECE)):
    count = min(plans.PIECE, size - start)
    padded = next(s for s in _SIZES if s >= count)
    yield Piece(number, start, count, (padded,))


class Timers:
  """Seconds spent reading, computing and writing, over all threads.

  Attributes:
    seconds: by phase.
    read_bytes: that were asked of the sources; more than they hold where a
      method reads them several times.
  """

  def __init__(self):
    self.seconds = {'read': 0.0, 'compute': 0.0, 'write': 0.0}
    self.read_bytes = 0
    self._lock = threading.Lock()

  def count_read(self, nbytes: int) -> None:
    """Counts bytes that were read; thread-safe."""
    with self._lock:
      self.read_bytes += nbytes

  def timed(self, phase: str, call: Callable, *args):
    started = time.perf_counter()
    result = call(*args)
    with self._lock:
      self.seconds[phase] += time.perf_counter() - started
    return result


class Leaf:
  """One parameter of the result while it is merged; belongs to one thread.

  Attributes:
    size: elements of the whole leaf, whoever merges them.
    contexts: what is known of it, one a model.
  """

  def __init__(
    self,
    plan: plans.Plan,
    task: plans.Task,
    buffers: dict[Any, Any],
    timers: Timers,
    numbers: tuple[int, int | None] = (0, None),
  ):
    """Reads nothing yet.

    Args:
      plan: what is merged.
      task: this parameter.
      buffers: of the thread, empty at first.
      timers: of the merge.
      numbers: the first piece that is merged here, and the one after the last;
        the whole leaf by default.
    """
    self._plan = plan
    self._task = task
    self._buffers = buffers
    self._timers = timers
    self._checked: set[int] = set()
    self.size = task.spec.size
    self._numbers = numbers
    self._resident = self.size <= plans.RESIDENT * plans.PIECE
    if task.settings is None:
      return
    self.method = task.settings.method
    if len(self.method.first_passes) == 0:
      self._resident = False  # one pass is all there is
    self._weights = np.asarray(task.weights, np.float32)
    self._keys = np.stack(
      [
        masks.mask_key(plan.recipe.seed, task.path, k)
        for k in range(len(task.inputs))
      ]
    )
    self.contexts = [
      base_lib.LeafContext(k, {}, key) for k, key in enumerate(self._keys)
    ]

  # Pieces -------------------------------------------------------------------

  def pieces(self) -> Iterator[Piece]:
    """The pieces of the leaf that are merged here, in order."""
    return itertools.islice(cut(self._task), *self._numbers)

  def _load(self, piece: Piece):
    """`(leaves, base, stats)` of a piece, padded with zeros."""
    # What the buffers hold is written beside them: leaves of a thread share
    # them.
    owner, held = self._buffers.get('held', (None, None))
    if owner is not self:
      held = {}
      self._buffers['held'] = (self, held)
    if piece.start not in held:
      if not self._resident:
        held.clear()
      held[piece.start] = self._timers.timed('read', self._read, piece)
    return held[piece.start]

  def _sources(self):
    """`(store, path)` of the models, then the base, then statistics."""
    task, stores = self._task, self._plan.stores
    refs = [(stores[name], path) for name, path in task.inputs]
    if task.base is not None:
      refs.append((stores[task.base[0]], task.base[1]))
    for store, own in zip(self._plan.stats, task.stats):
      refs += [(store, path) for path in own.values()]
    return refs

  def _needs(self):
    """What each of `_sources` is: a spec, or None of models and the base."""
    task = self._task
    models = [None] * (len(task.inputs) + (task.base is not None))
    specs = {}
    if any(task.stats):
      specs = {need.name: need for need in self.method.statistics}
    return models + [specs[name] for own in task.stats for name in own]

  def _roles(self, arrays):
    """`(leaves, base, stats)` from arrays in the order of `_sources`."""
    task, count = self._task, len(self._task.inputs)
    rest = iter(arrays[count:])
    base = next(rest) if task.base is not None else None
    stats = [None] * count
    for k, own in enumerate(task.stats):
      stats[k] = {name: next(rest) for name in own}
    return arrays[:count], base, stats

  def _read(self, piece):
    arrays = []
    sources = zip(self._sources(), self._needs(), strict=True)
    for slot, ((store, path), need) in enumerate(sources):
      array = self._buffer(slot, store.specs()[path].dtype, piece)
      store.read_into(path, piece.start, array[: piece.count])
      self._timers.count_read(array[: piece.count].nbytes)
      array[piece.count :] = 0
      if piece.start not in self._checked:
        self._check(store, path, array[: piece.count], need)
      arrays.append(array.reshape(piece.shape))
    self._checked.add(piece.start)
    return self._roles(arrays)

  def _buffer(self, slot, dtype, piece):
    """Memory of this thread, aligned so that JAX uses it where it is."""
    size = math.prod(piece.shape)
    begin = piece.number * plans.PIECE if self._resident else 0
    whole = self._buffers.get((slot, dtype.str))
    if whole is None or whole.size < begin + size:
      # Pages that are never touched cost nothing.
      room = max(begin + size, plans.RESIDENT * plans.PIECE) * dtype.itemsize
      raw = np.empty(room + 64, np.uint8)
      shift = -raw.ctypes.data % 64
      whole = raw[shift : room + shift].view(dtype)
      self._buffers[(slot, dtype.str)] = whole
    return whole[begin : begin + size]

  def _check(self, store, path, array, need):
    """Raises if a source has numbers that it cannot have."""
    if need is not None and need.values == 'any':
      return
    if finite.all_finite(array):
      if need is not None:
        check_sound(store, self._task, need, array)
      return
    bad = 0
    room = np.empty(plans.PIECE, array.dtype)
    for start in range(0, self.size, plans.PIECE):
      part = room[: min(plans.PIECE, self.size - start)]
      store.read_into(path, start, part)
      bad += int(np.count_nonzero(~np.isfinite(part.astype(np.float32))))
    raise errors.DataError(finite.of_input(store.name, path, bad, self.size))

  # Stages -------------------------------------------------------------------

  def _call(self, stage, number, arrays, offset=0, brackets=None):
    leaves, base, stats = arrays
    settings = self._task.settings
    program = settings.program(stage, number)
    return self._timers.timed(
      'compute',
      lambda: jax.tree.map(
        np.asarray,
        program(
          leaves, base, self._weights, self._keys,
          [m.note for m in self.contexts], stats, settings.numbers,
          # Methods that number elements have no leaf that wraps around.
          np.uint32(offset % 2**32), brackets,
        ),
      ),
    )  # fmt: skip

  def scores(self, i: int, piece: Piece) -> list[np.ndarray]:
    """The scores that first pass `i` gives the elements of a piece."""
    found = self._call('measure', i, self._load(piece), piece.start)
    return [score.reshape(-1)[: piece.count] for score in found]

  def _scores_of(self, i, arrays):
    """Scores of elements that were picked out of pieces: no unit is whole."""
    count = arrays[0].size
    padded = next((n for n in _SIZES if n >= count), count)
    room = [np.zeros(padded, array.dtype) for array in arrays]
    for target, array in zip(room, arrays):
      target[:count] = array
    return [s[:count] for s in self._call('measure', i, self._roles(room))]

  def bracketed(self, i: int, piece: Piece, brackets) -> tuple[Any, Any, Any]:
    """Where the scores of a piece lie to brackets, and those inside.

    Returns:
      `(places, index, values)`: `places[score][bracket]` <uint8>[n]; the
      positions that are inside any bracket; for each score its values there.
    """
    arrays = self._load(piece)
    if self.method.view == 'element':
      places = self._call('bracket', i, arrays, piece.start, brackets)
    else:
      places = [
        [ranks_lib.places(score, *bracket) for bracket in own]
        for score, own in zip(self.scores(i, piece), brackets)
      ]
    places = [[p.reshape(-1)[: piece.count] for p in own] for own in places]
    union = np.zeros(piece.count, bool)
    for own in places:
      for one in own:
        union |= one == ranks_lib.INSIDE
    index = np.flatnonzero(union)
    if self.method.view == 'element':
      picked = [array.reshape(-1)[index] for array in _in_order(arrays)]
      values = self._scores_of(i, picked)
    else:
      values = [score[index] for score in self.scores(i, piece)]
    return places, index, values

  def sample(self, i: int) -> list[np.ndarray]:
    """Some of the scores of first pass `i`, spread over the leaf."""
    found = []
    for piece in self.pieces():
      if self.method.view != 'element':
        own = [score[::_SAMPLE] for score in self.scores(i, piece)]
      elif self._resident:
        arrays = _in_order(self._load(piece))
        # An odd stride, so that the sample is not of a few columns.
        step = _SAMPLE + 1 if piece.count > 4096 else 1
        own = self._scores_of(
          i, [array.reshape(-1)[: piece.count : step] for array in arrays]
        )
      else:
        own = self._scores_of(i, self._stretches(piece))
      found.append(own)
    return [np.concatenate(own) for own in zip(*found)]

  def _stretches(self, piece):
    """Eight short stretches of a piece of every source."""
    length = max(1, piece.count // (8 * 2 * _SAMPLE))
    starts = np.linspace(0, piece.count - length, 8).astype(int)
    arrays = []
    for store, path in self._sources():
      room = np.empty((8, length), store.specs()[path].dtype)
      for row, start in zip(room, starts):
        store.read_into(path, piece.start + int(start), row)
      arrays.append(room.reshape(-1))
    return arrays

  def measured(self, i: int) -> Iterator[tuple[int, Any]]:
    """`(number of a piece, what first pass `i` finds in it)`, in float64."""
    for piece in self.pieces():
      found = self._call('measure', i, self._load(piece), piece.start)
      yield piece.number, jax.tree.map(_widest, found)

  def total(self, i: int) -> Any:
    """What first pass `i` finds, added up in float64 over the pieces."""
    combine = functools.partial(engine.combined, self.method.first_passes[i])
    return functools.reduce(combine, (found for _, found in self.measured(i)))

  def conclude(self, i: int, found: Any) -> None:
    """Adds what first pass `i` concludes to the contexts."""
    first_pass = self.method.first_passes[i]
    found = jax.tree.map(_narrow, found)
    if first_pass.ranks is None:
      settings = self._task.settings
      conclude = settings.conclusion(i)
      earlier = [context.note for context in self.contexts]
      notes = conclude(found, self._weights, settings.numbers, earlier)
    else:
      notes = first_pass.conclude(found, self.contexts, list(self._weights))
    notes = jax.tree.map(np.asarray, list(notes))
    self.contexts = engine.with_notes(self.contexts, notes)

  def first_passes(self) -> None:
    """Runs every first pass over this leaf alone."""
    engine.run_first_passes(self.method, [self], 'leaf', ranks_lib.rank)

  def merge(self, write: Callable[[int, np.ndarray], None]) -> None:
    """Merges every piece and hands it over: `write(start, array)`."""
    task = self._task
    for piece in self.pieces():
      if task.settings is None:
        merged = self._load(piece)[0][0]
      else:
        merged = self._call(
          'merge', task.spec.dtype.name, self._load(piece), piece.start
        )
      with np.errstate(over='ignore'):  # checked below
        merged = merged.reshape(-1)[: piece.count].astype(
          task.spec.dtype, copy=False
        )
      self._check_result(merged)
      self._timers.timed('write', write, piece.start, merged)

  def _check_result(self, merged):
    if not finite.all_finite(merged):
      bad = int(np.count_nonzero(~np.isfinite(merged.astype(np.float32))))
      needs = self.method.statistics if self._task.settings else ()
      raise errors.DataError(
        finite.of_result(self._task.path, bad, merged.dtype, needs)
      )


def _in_order(roles):
  """The arrays of `Leaf._roles`, in the order of `Leaf._sources`."""
  leaves, base, stats = roles
  arrays = [*leaves, *([] if base is None else [base])]
  return arrays + [leaf for own in stats if own for leaf in own.values()]


def check_sound(store, task, need, found):
  """Raises if a statistic, or a piece of one, cannot be what it is called."""
  fault = given.unsound(need, found)
  if fault:
    raise errors.DataError(
      f'{store.name}: the {need.name} of {task.path} {fault}.'
    )


def _widest(leaf):
  wide = np.float64 if np.issubdtype(leaf.dtype, np.floating) else np.int64
  return leaf.astype(wide)


def _narrow(leaf):
  leaf = np.asarray(leaf)
  if leaf.dtype == np.float64:
    return leaf.astype(np.float32)
  return leaf.astype(np.uint32) if leaf.dtype == np.int64 else leaf
