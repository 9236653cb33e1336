# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of numbers that come in pieces, in little memory.

A sample says roughly where the wanted rank lies; one pass over the pieces
counts what is above a bracket around it and keeps the few scores inside.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import numpy as np

from mergejax.core import numerics
from mergejax.merging.disk import plans

# Where scores lie to a bracket; 0 is below it. If its two ends are equal, so is
# what is inside.
AT_LOW, INSIDE, AT_HIGH, ABOVE = 1, 2, 3, 4


def places(score: np.ndarray, low: np.float32, high: np.float32) -> np.ndarray:
  """Where scores lie to a bracket: 0 below it, then the names above."""
  result = (score > low).astype(np.uint8)
  for mask in (score >= low, score >= high, score > high):
    result += mask
  return result


class Ranker:
  """Exact order statistics of scores that come in pieces, in any order.

  Scores above the bracket and equal to its ends are counted, those strictly
  inside are kept. Bfloat16 task vectors have few distinct magnitudes, so that
  a tenth of a leaf may equal one end: counting them costs no memory.

  Attributes:
    low: <float32>[] lower end of the bracket.
    high: <float32>[] upper end.
    done: the `Cut`, its end a Python integer, or None while it is not known.
  """

  def __init__(self, size: int, rank: int, sample: np.ndarray):
    """Aims a bracket.

    Args:
      size: how many scores will come.
      rank: the rank-th largest is looked for, 0 to `size`.
      sample: <float32>[n] some of the scores.
    """
    self._rank = rank
    self.done = None
    self.low = self.high = np.float32(np.inf)
    if rank == 0:
      self.done = numerics.Cut(np.float32(np.inf), 0)
    elif rank >= size:
      self.done = numerics.Cut(np.float32(-np.inf), 0)
    else:
      share = rank / size
      at = (1 - share) * (sample.size - 1)
      margin = 4 * math.sqrt(sample.size * share * (1 - share)) + 2
      low, high = math.floor(at - margin), math.ceil(at + margin)
      inside = [k for k in (low, high) if 0 <= k < sample.size]
      ordered = np.partition(sample, inside) if inside else sample
      self.low = ordered[low] if low >= 0 else np.float32(-np.inf)
      self.high = ordered[high] if high < sample.size else self.high
    self._reset()

  def _reset(self):
    self._above = 0
    self._values: list[np.ndarray] = []
    self._places: list[np.ndarray] = []
    # (start, how many equal the upper end, how many the lower)
    self._equal: list[tuple[int, int, int]] = []

  def add(
    self, places: np.ndarray, index: np.ndarray, values: np.ndarray, start: int
  ) -> None:
    """Takes a piece.

    Args:
      places: <uint8>[n] where each score lies to the bracket: 0 below, 1 at
        its lower end, 2 inside (or at both ends, if they are equal), 3 at its
        upper end, 4 above.
      index: <int64>[m] positions in the piece among which are all inside.
      values: <float32>[m] the scores there.
      start: position of the piece.
    """
    count = lambda place: int(np.count_nonzero(places == place))
    self._above += count(ABOVE)
    if self.low == self.high:
      self._equal.append((start, count(INSIDE), 0))
      return
    self._equal.append((start, count(AT_HIGH), count(AT_LOW)))
    inside = places[index] == INSIDE
    self._values.append(values[inside])
    self._places.append(index[inside] + start)

  def conclude(self, places_at: Callable[[int], np.ndarray]) -> bool:
    """Finds the cut after all pieces came; False asks for them once more.

    Args:
      places_at: gives the places of the piece that starts at a position again.

    Returns:
      True if `done` holds the cut. False if the bracket missed and was moved:
      add every piece again.
    """
    left = self._rank - self._above
    at_high = sum(high for _, high, _ in self._equal)
    at_low = sum(low for _, _, low in self._equal)
    values = np.concatenate([*self._values, np.empty(0, np.float32)])
    if left < 1:
      self.low, self.high = self.high, np.float32(np.inf)
    elif left <= at_high:
      self._locate(self.high, left, 1, places_at)
    elif left <= at_high + values.size:
      left -= at_high
      at = values.size - left
      threshold = np.partition(values, at)[at]
      left -= int(np.count_nonzero(values > threshold))
      index = np.concatenate(self._places)[values == threshold]
      self.done = numerics.Cut(threshold, int(np.sort(index)[left - 1]) + 1)
    elif left <= at_high + values.size + at_low:
      left -= at_high + values.size
      self._locate(self.low, left, 2, places_at)
    else:
      self.low, self.high = np.float32(-np.inf), self.low
    self._reset()
    return self.done is not None

  def _locate(self, threshold, left, column, places_at):
    """The position of the `left`-th score that equals the threshold."""
    wanted = AT_HIGH if column == 1 else AT_LOW
    wanted = INSIDE if self.low == self.high else wanted
    for entry in sorted(self._equal):
      if left <= entry[column]:
        start = entry[0]
        index = np.flatnonzero(places_at(start) == wanted)
        self.done = numerics.Cut(threshold, start + int(index[left - 1]) + 1)
        return
      left -= entry[column]


def rank(
  i: int, leaves: Sequence[Any], wanted: Sequence[Sequence[Any]]
) -> list[list[list[numerics.Cut]]]:
  """Exact ranks of first pass `i` over `pieces.Leaf`s; see `engine.Cuts`."""
  starts = np.cumsum([0] + [leaf.size for leaf in leaves])
  size = int(starts[-1])
  sample = [
    np.concatenate(own) for own in zip(*(leaf.sample(i) for leaf in leaves))
  ]
  rankers = [
    [Ranker(size, r, one) for r in ranks] for ranks, one in zip(wanted, sample)
  ]

  def places_at(s, j):
    def run(start):
      if start in kept:
        return kept[start][s][j]
      # Empty leaves share their start with the next one.
      number = int(np.searchsorted(starts, start, side='right')) - 1
      piece = next(
        p for p in leaves[number].pieces() if p.start + starts[number] == start
      )
      return leaves[number].bracketed(i, piece, brackets)[0][s][j]

    return run

  waiting = [
    (s, j, ranker)
    for s, own in enumerate(rankers)
    for j, ranker in enumerate(own)
    if ranker.done is None
  ]
  while waiting:
    brackets = np.asarray([[(r.low, r.high) for r in own] for own in rankers])
    kept = {}
    for number, leaf in enumerate(leaves):
      for piece in leaf.pieces():
        places, index, values = leaf.bracketed(i, piece, brackets)
        start = piece.start + int(starts[number])
        if size <= plans.RESIDENT * plans.PIECE:
          kept[start] = places
        for s, j, ranker in waiting:
          ranker.add(places[s][j], index, values[s], start)
    waiting = [
      (s, j, ranker)
      for s, j, ranker in waiting
      if not ranker.conclude(places_at(s, j))
    ]
  return [
    [[local(r.done, starts[n], leaf.size) for r in own] for own in rankers]
    for n, leaf in enumerate(leaves)
  ]


def local(cut: numerics.Cut, start: int, size: int) -> numerics.Cut:
  """A cut over several leaves, as one of them sees it."""
  end = min(max(int(cut.end) - int(start), 0), size)
  return numerics.Cut(np.float32(cut.threshold), np.uint32(end))
