# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Axes as products of atoms: what `trace` follows through a model."""

from collections.abc import Sequence


class Atom:
  """A set of positions that belong together; joined ones share a root.

  Attributes:
    size: number of positions.
    pinned: they may not be permuted.
    parts: the atoms it was split into, slowest first, or None.
  """

  def __init__(self, size: int, pinned: bool = False):
    self.size = size
    self.pinned = pinned
    self.parts: list[Atom] | None = None
    self._parent: Atom | None = None

  def root(self) -> 'Atom':
    """The atom that stands for all that were joined with this one."""
    atom = self
    while atom._parent is not None:
      atom = atom._parent
    return atom

  def split(self, first: int) -> None:
    """Splits a root into a slow part of `first` positions and a fast one."""
    rest = self.size // first
    self.parts = [Atom(first, self.pinned), Atom(rest, self.pinned)]

  def join(self, other: 'Atom') -> None:
    """Makes two roots of one size the same."""
    self.pinned |= other.pinned
    other._parent = self


# The atoms of an axis, slowest first; none for an axis of size 1.
Axis = list[Atom]


def expanded(axis: Axis) -> Axis:
  """The axis as roots that are not split any further."""
  result = []
  for atom in axis:
    root = atom.root()
    result += expanded(root.parts) if root.parts is not None else [root]
  return result


def pin(axis: Axis) -> None:
  """Forbids permutations of an axis."""
  for atom in expanded(axis):
    atom.pinned = True


def same(first: Axis, second: Axis) -> None:
  """Says that two axes number the same things."""
  while True:
    a, b = expanded(first), expanded(second)
    differ = next((i for i, (x, y) in enumerate(zip(a, b)) if x is not y), None)
    if differ is None:
      if len(a) != len(b):
        pin(first)
        pin(second)
      return
    x, y = a[differ], b[differ]
    if x.size == y.size:
      x.join(y)
    elif x.size < y.size and y.size % x.size == 0:
      y.split(x.size)
    elif y.size < x.size and x.size % y.size == 0:
      x.split(y.size)
    else:
      pin(first)
      pin(second)
      return


class Traced:
  """A parameter or any other array of the trace: the atoms of its axes."""

  def __init__(self, axes: Sequence[Axis]):
    self.axes = list(axes)

  @classmethod
  def fresh(cls, shape: Sequence[int], pinned: bool = False) -> 'Traced':
    return cls([[Atom(n, pinned)] if n > 1 else [] for n in shape])

  def pin(self) -> None:
    for axis in self.axes:
      pin(axis)
