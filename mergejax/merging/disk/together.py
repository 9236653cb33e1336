# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""First passes over parameters that several processes hold parts of.

Each process measures the pieces that it merges; what they found is combined in
the order of the pieces, so that the numbers are those of one process, to the
last bit. Order statistics are found by counting: how many scores begin with
which 16 bits, then how many of those that begin like the wanted one end with
which. Two rounds of counts tell the exact score whatever the number of
processes, a third where the last one equal to it lies.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
import functools
import io
from typing import Any

import jax
import numpy as np

from mergejax.core import numerics
from mergejax.merging import engine
from mergejax.merging.disk import pieces
from mergejax.merging.disk import processes
from mergejax.merging.disk import ranks as ranks_lib
from mergejax.methods import base as base_lib

# What a process says, and what all said, in their order.
Talk = Generator[bytes, list[bytes], Any]
# Rounds of a pass without ranks, and of one with them.
_SUM, _RANK = 1, 3
_HALF = 16


def first_passes(
  group: processes.Group,
  jobs: Sequence[tuple[base_lib.Merge, Sequence[pieces.Leaf]]],
  scope: str,
) -> None:
  """Runs the first passes of one scope; the leaves keep what they find.

  Args:
    group: the processes; each calls this with the same jobs.
    jobs: methods, and the leaves that are taken together; each process holds
      all of them, with the pieces that it merges itself.
    scope: 'leaf' or 'tree'.
  """
  talks = [
    functools.partial(_passes, method, leaves, scope, group)
    for method, leaves in jobs
  ]
  processes.by_turns(group, talks)


def _passes(method, leaves, scope, group) -> Talk:
  mine = any(True for leaf in leaves for _ in leaf.pieces())
  for number, first_pass in enumerate(method.first_passes):
    if first_pass.scope != scope:
      continue
    if not mine:  # whoever merges them needs no word of this process
      for _ in range(_SUM if first_pass.ranks is None else _RANK):
        yield b''
    elif first_pass.ranks is None:
      found = yield from _total(first_pass, number, leaves)
      for leaf in leaves:
        leaf.conclude(number, found)
    else:
      cuts = yield from _cuts(first_pass, number, leaves, group)
      for leaf, found in zip(leaves, cuts):
        leaf.conclude(number, found)


# Sums ------------------------------------------------------------------------


def _total(first_pass, number, leaves) -> Talk:
  """What a pass finds over all leaves: pieces, then leaves, in their order."""
  places, founds = [], []
  for k, leaf in enumerate(leaves):
    for piece, found in leaf.measured(number):
      places.append((k, piece))
      founds.append(found)
  structure = jax.tree.structure(founds[0])
  columns = zip(*map(jax.tree.leaves, founds))
  arrays = {str(i): np.stack(column) for i, column in enumerate(columns)}
  said = yield _saved(place=np.asarray(places, np.int64), **arrays)
  rows = {}
  for there in map(_loaded, said):
    for row, (k, piece) in enumerate(there.pop('place', ())):
      values = [there[str(i)][row] for i in range(len(there))]
      rows[int(k), int(piece)] = jax.tree.unflatten(structure, values)
  combine = functools.partial(engine.combined, first_pass)
  of_leaves: dict[int, list[Any]] = {}
  for k, piece in sorted(rows):
    of_leaves.setdefault(k, []).append(rows[k, piece])
  totals = [functools.reduce(combine, founds) for founds in of_leaves.values()]
  return functools.reduce(combine, totals)


# Ranks -----------------------------------------------------------------------


def _cuts(first_pass, number, leaves, group) -> Talk:
  """`engine.Cuts` of the pass over all leaves."""
  starts = np.cumsum([0] + [leaf.size for leaf in leaves])
  size = int(starts[-1])
  wanted = first_pass.ranks(size, leaves[0].contexts)
  searches = [
    _Search(s, int(rank), size)
    for s, of_score in enumerate(wanted)
    for rank in dict.fromkeys(of_score)
  ]
  keys = functools.partial(_keys, leaves, number, starts)
  yield from _count(searches, keys, _upper_counts, _Search.take_upper)
  yield from _count(searches, keys, _lower_counts, _Search.take_lower)
  yield from _locate(searches, keys, group)
  found = {(search.score, search.rank): search.cut for search in searches}
  return [
    [
      [
        ranks_lib.local(found[s, int(r)], starts[n], leaf.size)
        for r in of_score
      ]
      for s, of_score in enumerate(wanted)
    ]
    for n, leaf in enumerate(leaves)
  ]


class _Search:
  """One order statistic of one score while it is looked for.

  Attributes:
    score: which of the scores.
    rank: the rank-th largest is looked for.
    cut: what was found, or None.
    upper: the first half of its key.
    key: all of it.
    left: how many of those equal to it are still among the largest.
    equal: how many are equal to it, by process.
  """

  def __init__(self, score: int, rank: int, size: int):
    self.score, self.rank = score, rank
    self.cut = None
    self.upper = self.key = self.left = 0
    self.equal: list[int] = []
    if rank <= 0:
      self.cut = numerics.Cut(np.float32(np.inf), 0)
    elif rank >= size:
      self.cut = numerics.Cut(np.float32(-np.inf), 0)

  def take_upper(self, counts: list[np.ndarray]) -> None:
    """Counts of the first halves of all keys, by process."""
    self.upper, self.left = _place(sum(counts), self.rank)

  def take_lower(self, counts: list[np.ndarray]) -> None:
    """Counts of the second halves of keys that begin alike, by process."""
    lower, self.left = _place(sum(counts), self.left)
    self.key = (self.upper << _HALF) | lower
    self.equal = [int(there[lower]) for there in counts]

  def owner(self) -> tuple[int, int]:
    """The process that has the last equal one, and how many it has of them."""
    left = self.left
    for process, count in enumerate(self.equal):
      if left <= count:
        return process, left
      left -= count
    raise ValueError('Not as many scores are equal as were counted.')


def _place(counts, rank):
  """`(bin, rank inside it)` of the rank-th largest."""
  above = np.cumsum(counts[::-1])
  at = int(np.searchsorted(above, rank))
  return counts.size - 1 - at, rank - int(above[at] - counts[::-1][at])


def _keys(
  leaves, number, starts, chosen: Iterable[int]
) -> Iterable[tuple[int, dict[int, np.ndarray]]]:
  """`(position, {score: keys in the order of scores})` of every piece here."""
  chosen = set(chosen)
  for leaf, start in zip(leaves, starts):
    for piece in leaf.pieces():
      scores = leaf.scores(number, piece)
      keys = {s: _order_key(scores[s]) for s in chosen}
      yield int(start) + piece.start, keys


def _order_key(scores):
  """<uint32>[n] in the order of float32 scores; -0 and 0 share a key."""
  bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
  return np.where(bits >> 31 == 1, ~bits, bits | np.uint32(1 << 31))


def _threshold(key):
  bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
  return np.uint32(bits).view(np.float32)


def _upper_counts(search, keys):
  del search
  return np.bincount(keys >> _HALF, minlength=1 << _HALF)


def _lower_counts(search, keys):
  inside = keys[keys >> _HALF == search.upper]
  return np.bincount(inside & ((1 << _HALF) - 1), minlength=1 << _HALF)


def _count(
  searches: Sequence[_Search],
  keys: Callable[..., Any],
  counts_of: Callable[..., np.ndarray],
  take: Callable[[_Search, list[np.ndarray]], None],
) -> Talk:
  """One round of counts: each search takes those of every process."""
  unknown = [search for search in searches if search.cut is None]
  totals = np.zeros((len(unknown), 1 << _HALF), np.int64)
  if unknown:
    for _, found in keys(search.score for search in unknown):
      for total, search in zip(totals, unknown):
        total += counts_of(search, found[search.score])
  said = [_loaded(word) for word in (yield _saved(counts=totals))]
  nothing = np.zeros_like(totals)
  gathered = [there.get('counts', nothing) for there in said]
  for k, search in enumerate(unknown):
    take(search, [there[k] for there in gathered])


def _locate(searches, keys, group) -> Talk:
  """The last round: where the last of the equal scores lie."""
  unknown = [search for search in searches if search.cut is None]
  ends = np.zeros(len(unknown), np.int64)
  here = {
    k: left
    for k, (process, left) in enumerate(search.owner() for search in unknown)
    if process == group.index
  }
  for start, found in keys({unknown[k].score for k in here}) if here else ():
    for k, left in list(here.items()):
      index = np.flatnonzero(found[unknown[k].score] == unknown[k].key)
      if left <= index.size:
        ends[k] = start + int(index[left - 1]) + 1
        del here[k]
      else:
        here[k] = left - index.size
    if not here:
      break
  said = [_loaded(word) for word in (yield _saved(ends=ends))]
  ends = sum(there['ends'] for there in said if there)
  for search, end in zip(unknown, ends):
    search.cut = numerics.Cut(_threshold(search.key), int(end))


# Bytes -----------------------------------------------------------------------


def _saved(**arrays: np.ndarray) -> bytes:
  stream = io.BytesIO()
  np.savez_compressed(stream, **arrays)
  return stream.getvalue()


def _loaded(word: bytes) -> dict[str, np.ndarray]:
  """The arrays of another process; none of one that has no part."""
  if not word:
    return {}
  with np.load(io.BytesIO(word), allow_pickle=False) as archive:
    return dict(archive)
