# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight matching: permutations that bring one model close to another."""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from mergejax import errors
from mergejax import numerics
from mergejax import tree as tree_lib
from mergejax import typing
from mergejax.align import spec as spec_lib

# An improvement below this share of |a| |b| is rounding; in float32 an absolute
# threshold can go round in circles.
_PROGRESS = 1e-8
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


def match_weights(
  spec: spec_lib.PermutationSpec,
  a: typing.Tree,
  b: typing.Tree,
  key: jax.Array | int = 0,
  *,
  initial: spec_lib.Permutation | None = None,
  fixed: Sequence[str] = (),
  max_iter: int = 100,
  progress: Callable[[int, float], None] = lambda sweep, gained: None,
) -> spec_lib.Permutation:
  """Permutes b's units so that `<a, permuted b>` is large; needs no data.

  Coordinate ascent: with all other permutations held, the best one of a group
  is a linear assignment problem, `max_P sum_i S[i, P(i)]` with S the inner
  products of a's and b's units over all leaves. Sweeps visit the groups in
  random order until none improves. A group whose neighbours have not moved
  since its last visit is not visited again. Heads and their dimensions are
  assigned jointly: the best permutation of dimensions for every pair of heads,
  then the best pairs.

  The released code starts at the identity, which means nothing for models that
  were trained apart: in the first sweep most of what it compares is noise. Here
  the first visit of a group compares only leaves whose other groups have been
  visited before, in the order in which the most is known of a group: from the
  inputs on, as a rule. The identity is the start where it is nearer than that.

  Args:
    spec: the groups; see `derive` and `permutation_spec`.
    a: the model to be matched.
    b: the model to be permuted.
    key: a JAX key or an integer, for the order of the visits.
    initial: where to begin; by default from the first visits above.
    fixed: full-match patterns of groups that stay.
    max_iter: sweeps at most.
    progress: called after each sweep with its number and what it gained.

  Returns:
    `{group: index}` for `permute`, a local optimum.

  Raises:
    UserError: trees that do not fit the specification, similarities that are
      not finite.

  Source: Ainsworth et al., "Git Re-Basin" (2023),
  https://arxiv.org/abs/2209.04836, algorithm 1.
  """
  spec_lib.check_model(spec, a, 'model a')
  spec_lib.check_model(spec, b, 'model b')
  pairs = _Pairs(spec, a, b)
  staying = spec_lib.matching(spec, fixed)
  every = {n: u for n, u in units(spec).items() if n not in staying}
  rng = make_rng(key)
  if initial is None:
    permutation = _first_visits(spec, pairs, every, rng)
  else:
    spec_lib.check_permutation(spec, initial)
    permutation = {n: np.array(index) for n, index in initial.items()}
  scale = pairs.scale()
  stale = set(every)
  for sweep in range(max_iter):
    gained = 0.0
    for together in _independent(every, rng.permutation(list(every)), pairs):
      visits = [n for n in together if n in stale]
      # All are started before the first is waited for.
      found = [pairs.similarities(every[n], permutation) for n in visits]
      for name, similarity in zip(visits, found):
        unit = every[name]
        new, gain = assign(spec, unit, similarity, permutation)
        stale.discard(name)
        if gain > _PROGRESS * scale:
          gained += gain
          permutation |= new
          stale |= pairs.neighbours(unit) & set(every)
    progress(sweep + 1, gained)
    if not stale:
      break
  return permutation


def objective(
  spec: spec_lib.PermutationSpec,
  a: typing.Tree,
  b: typing.Tree,
  permutation: spec_lib.Permutation | None = None,
) -> float:
  """`<a, permuted b>` over all leaves, in float64 from float32 products."""
  return _Pairs(spec, a, b).objective(permutation or {})


def make_rng(key: jax.Array | int) -> np.random.Generator:
  """A NumPy generator from a JAX key or an integer."""
  if isinstance(key, int):
    return np.random.default_rng(key)
  return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _first_visits(spec, pairs, every, rng):
  """Visits each unit once, comparing what earlier visits have settled."""
  identity = spec_lib.identity(spec)
  permutation = dict(identity)
  open_ = dict(every)
  while open_:
    # Chance decides between units of which about as much is settled.
    shares = [pairs.settled(one, open_) for one in open_.values()]
    first = np.argmax(shares * rng.uniform(0.5, 1.0, len(shares)))
    unit = list(open_.values())[first]
    waiting = set(open_) - {unit.name}
    # Of a unit of which nothing is settled everything is compared.
    found = pairs.similarities(unit, permutation, waiting) or (
      pairs.similarities(unit, permutation)
    )
    permutation |= assign(spec, unit, found, permutation)[0]
    del open_[unit.name]
  return max(identity, permutation, key=pairs.objective)


def _independent(every, order, pairs):
  """Cuts an order of visits into runs that share no leaf."""
  run: list[str] = []
  for name in order:
    near = pairs.neighbours(every[str(name)])
    if any(other in near for other in run):
      yield run
      run = []
    run.append(str(name))
  yield run


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


class _Pairs:
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
    leaders = {self._leader.get(n) for n in self._factors[path]}
    return leaders - {None, unit.name}

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
    moved = None
    if cached is not None:
      moved = [n for n, x in others.items() if (x != cached.others[n]).any()]
      if not moved:
        return cached.value
    value = None
    if moved is not None and len(moved) == 1 and cached.updates < _UPDATES:
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
    rows = (names.index(unit.name),)
    rows += () if child is None else (names.index(child),)
    found = _inner(a, b, batch, rows)
    counts = [a.shape[rows[0]], 1 if child is None else a.shape[rows[1]]]
    return found.reshape(-1, *counts, *counts)


def assign(
  spec: spec_lib.PermutationSpec,
  unit: Unit,
  similarities: Mapping[str | None, Any],
  permutation: spec_lib.Permutation,
) -> tuple[spec_lib.Permutation, float]:
  """Solves the assignment of a unit.

  Args:
    spec: the groups.
    unit: the leading group and its children.
    similarities: from `_Pairs.similarities`.
    permutation: the one so far.

  Returns:
    `(new indices of the unit's groups, what they gain over the old ones)`.

  Raises:
    UserError: a similarity that is not finite.
  """
  host = {c: np.asarray(s, np.float64) for c, s in similarities.items()}
  for values in host.values():
    if not np.isfinite(values).all():
      raise errors.UserError(
        f'The similarities of {unit.name} are not finite: look for infinite or '
        'undefined numbers in the models.'
      )
  size = spec.groups[unit.name].size
  stacks = max(1, int(np.prod([spec_lib.size_of(spec, s) for s in unit.stack])))
  old = {
    n: np.asarray(permutation[n]).reshape(stacks, -1)
    if n == unit.name
    else np.asarray(permutation[n]).reshape(stacks, size, -1)
    for n in (unit.name, *unit.children)
  }
  new = {n: x.copy() for n, x in old.items()}
  gain = 0.0
  for layer in range(stacks):
    # [n, n]: the value of giving place i the unit j, positions at their best.
    value = np.zeros((size, size))
    inner = {}
    before = 0.0
    leaders = old[unit.name][layer]
    for child, whole in host.items():
      block = whole[layer]  # [n, m, n, m]
      if child is None:
        plain = block[:, 0, :, 0]
        value += plain
        before += plain[np.arange(size), leaders].sum()
        continue
      inner[child] = np.empty((size, size, block.shape[1]), np.int64)
      for i in range(size):
        for j in range(size):
          table = block[i, :, j, :]
          _, columns = optimize.linear_sum_assignment(table, maximize=True)
          inner[child][i, j] = columns
          value[i, j] += table[np.arange(len(columns)), columns].sum()
        table = block[i, :, leaders[i], :]
        own = old[child][layer, i]
        before += table[np.arange(len(own)), own].sum()
    _, columns = optimize.linear_sum_assignment(value, maximize=True)
    better = value[np.arange(size), columns].sum() - before
    if better > 0:
      gain += better
      new[unit.name][layer] = columns
      for child, found in inner.items():
        new[child][layer] = found[np.arange(size), columns]
  shaped = {
    n: x.reshape(spec_lib.index_shape(spec, n)).astype(np.int32)
    for n, x in new.items()
  }
  return shaped, float(gain)


def merge_many(
  spec: spec_lib.PermutationSpec,
  models: Sequence[typing.Tree],
  key: jax.Array | int = 0,
  *,
  max_iter: int = 20,
) -> list[typing.Tree]:
  """Aligns several models with each other, for their mean.

  Repeats: each model in random order is matched to the mean of the others; ends
  when a sweep brings none of them closer.

  Args:
    spec: the groups.
    models: at least two; they are left as they are.
    key: for the orders.
    max_iter: sweeps at most.

  Returns:
    The models, permuted; average them with `merge(..., 'linear')`.

  Raises:
    UserError: fewer than two models, or models that do not fit.

  Source: Ainsworth et al. (2023), algorithm 3.
  """
  if len(models) < 2:
    raise errors.UserError(
      f'Aligning models with each other takes at least two, {len(models)} given.'
    )
  rng = make_rng(key)
  models = list(models)

  def distance(first, second):
    return sum(
      float(jnp.sum(jnp.square(numerics.widen(x) - numerics.widen(y))))
      for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second))
    )

  # Models that have been matched before are near the identity.
  initial = None
  for _ in range(max_iter):
    progress = False
    for k in rng.permutation(len(models)):
      others = [m for i, m in enumerate(models) if i != k]
      mean = jax.tree.map(
        lambda *x: sum(numerics.widen(y) for y in x) / len(x), *others
      )
      found = match_weights(
        spec, mean, models[k], int(rng.integers(2**31)), initial=initial
      )
      moved = spec_lib.permute(spec, found, models[k])
      before = distance(mean, models[k])
      if distance(mean, moved) < before * (1 - 1e-6):
        models[k], progress = moved, True
    if not progress:
      break
    initial = spec_lib.identity(spec)
  return models
