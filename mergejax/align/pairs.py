# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Inner products of the units of two models, kept up to date as units move."""

from collections.abc import Collection, Mapping
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mergejax.align import spec as spec_lib
from mergejax.core import numerics
from mergejax.core import tree as tree_lib

# A similarity is brought up to date for so many moved units at once, and
# computed afresh after so many updates, which each add a rounding error.
_UPDATE_SIZES = (16, 64, 128)
_UPDATES = 12


class Unit(NamedTuple):
  """A group, with those that are permuted inside of it.

  Attributes:
    name: the group.
    stack: its parents, all of them stacks.
    children: groups of which it is a parent: `head_dim` of each head.
  """

  name: str
  stack: tuple[str, ...]
  children: tuple[str, ...]


def units(spec: spec_lib.PermutationSpec) -> dict[str, Unit]:
  """The groups that are matched together, by the name of the leading one."""
  result = {}
  for name, group in spec.groups.items():
    if any(p in spec.groups for p in group.parents):
      continue
    children = tuple(n for n, g in spec.groups.items() if name in g.parents)
    result[name] = Unit(name, group.parents, children)
  return result


@functools.partial(jax.jit, static_argnames=('batch', 'rows'))
def _inner(a, b, batch, rows):
  """Inner products over all axes but `batch` and `rows`.

  Args:
    a: <float32>[...].
    b: <float32>[...], of the same shape.
    batch: axes of stacks, kept.
    rows: axes of the units, kept for both.

  Returns:
    <float32>[*batch, *rows of a, *rows of b].
  """
  rest = [i for i in range(a.ndim) if i not in (*batch, *rows)]
  order = (*batch, *rows, *rest)
  # Batch axes first, then units: the order that `dot_general` leaves.
  a, b = jnp.transpose(a, order), jnp.transpose(b, order)
  left = range(len(batch) + len(rows), a.ndim)
  return lax.dot_general(
    a, b, ((left, left), (range(len(batch)), range(len(batch)))),
    precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
  )  # fmt: skip


class _Known(NamedTuple):
  """A leaf's similarity, and the permutations it was computed under."""

  value: jax.Array
  others: Mapping[str, np.ndarray]
  updates: int


class Pairs:
  """Two models, unfolded into factors, and their inner products."""

  def __init__(self, spec, a, b):
    self._spec = spec
    wide = lambda tree: {
      path: spec_lib.unfolded(spec, path, numerics.widen(jnp.asarray(leaf)))
      for path, leaf in tree_lib.flatten(tree).items()
      if numerics.is_averaged(leaf.dtype)
    }
    self._a, self._b = wide(a), wide(b)
    self._factors = {
      path: [f.name for axis in spec.leaves[path] for f in axis]
      for path in self._a
    }
    self._leader = {}
    for name, unit in units(spec).items():
      self._leader |= {n: name for n in (name, *unit.children)}
    self._near: dict[str, set[str]] = {}
    self._known: dict[tuple[str, str], _Known] = {}

  def scale(self) -> float:
    """|a| |b|, which no objective exceeds."""
    norm = lambda leaves: np.sqrt(
      sum(float(jnp.vdot(x, x)) for x in leaves.values())
    )
    return norm(self._a) * norm(self._b)

  def objective(self, permutation) -> float:
    total = 0.0
    for path, leaf in self._a.items():
      other = spec_lib.permute_leaf(
        self._spec, path, self._b[path], permutation
      )
      total += float(jnp.vdot(leaf, other, precision=lax.Precision.HIGHEST))
    return total

  def neighbours(self, unit: Unit) -> set[str]:
    """Units that share a leaf with this one."""
    if unit.name not in self._near:
      paths = [p for p, names in self._factors.items() if unit.name in names]
      self._near[unit.name] = set().union(
        *(self._others(unit, path) for path in paths)
      )
    return self._near[unit.name]

  def _others(self, unit, path):
    """Units of a leaf beside this one."""
    names = self._factors[path]
    leaders = {self._leader[n] for n in names if n in self._leader}
    return leaders - {unit.name}

  def settled(self, unit: Unit, waiting: Collection[str]) -> float:
    """The share of a unit's weights that touch no waiting unit."""
    sizes = {True: 0, False: 0}
    for path, names in self._factors.items():
      if unit.name in names:
        known = self._others(unit, path).isdisjoint(waiting)
        sizes[known] += self._a[path].size
    return sizes[True] / (sizes[True] + sizes[False])

  def similarities(
    self, unit: Unit, permutation, waiting: Collection[str] = ()
  ) -> dict[str | None, Any]:
    """Similarities of units, by child (None for leaves without one).

    Args:
      unit: the leading group and its children.
      permutation: the one so far.
      waiting: units whose leaves are left out.

    Returns:
      `{child: <float32>[stack, n, m, n, m]}` for n units of m positions.
    """
    own = {unit.name, *unit.children}
    sums: dict[str | None, Any] = {}
    for path, names in self._factors.items():
      if unit.name not in names:
        continue
      if not self._others(unit, path).isdisjoint(waiting):
        continue
      others = {
        n: permutation[n] for n in names if n in permutation and n not in own
      }
      child = next((c for c in unit.children if c in names), None)
      found = self._of_leaf(unit, child, path, others)
      sums[child] = found if child not in sums else sums[child] + found
    return sums

  def _of_leaf(self, unit, child, path, others):
    """What one leaf adds; remembered, as most others stay between visits."""
    cached = self._known.get((unit.name, path))
    value, updates = None, 0
    if cached is not None:
      moved = [n for n, x in others.items() if (x != cached.others[n]).any()]
      if not moved:
        return cached.value
      if len(moved) == 1 and cached.updates < _UPDATES:
        value = self._updated(unit, child, path, cached, moved[0], others)
      updates = cached.updates + 1 if value is not None else 0
    if value is None:
      b = spec_lib.permute_leaf(self._spec, path, self._b[path], others)
      value = self._compared(unit, child, path, self._a[path], b)
    copies = {n: np.array(x) for n, x in others.items()}
    self._known[unit.name, path] = _Known(value, copies, updates)
    return value

  def _updated(self, unit, child, path, cached, name, others):
    """The similarity after a few units of one other group have moved."""
    if any(self._spec.groups[n].parents for n in others):
      return None
    new, old = np.asarray(others[name]), cached.others[name]
    places = np.flatnonzero(new != old)
    size = next((n for n in _UPDATE_SIZES if n >= len(places)), None)
    if size is None or size > len(new) // 2:
      return None
    # Filled up with places that have not moved, whose difference is zero.
    still = np.flatnonzero(new == old)[: size - len(places)]
    places = np.concatenate([places, still])
    axis = self._factors[path].index(name)
    rest = {n: x for n, x in others.items() if n != name}
    a = jnp.take(self._a[path], places, axis=axis)
    b = jnp.take(self._b[path], new[places], axis=axis) - jnp.take(
      self._b[path], old[places], axis=axis
    )
    b = spec_lib.permute_leaf(self._spec, path, b, rest)
    return cached.value + self._compared(unit, child, path, a, b)

  def _compared(self, unit, child, path, a, b):
    """`[stack, n, m, n, m]` inner products over all other axes."""
    names = self._factors[path]
    batch = tuple(names.index(s) for s in unit.stack)
    rows = [names.index(unit.name)]
    rows += [] if child is None else [names.index(child)]
    found = _inner(a, b, batch, tuple(rows))
    counts = [a.shape[rows[0]], 1 if child is None else a.shape[rows[1]]]
    return found.reshape(-1, *counts, *counts)
