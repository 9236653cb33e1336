# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight matching: permutations that bring one model close to another."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from mergejax.align import pairs as pairs_lib
from mergejax.align import spec as spec_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing

# An improvement below this share of |a| |b| is rounding; in float32 an absolute
# threshold can go round in circles.
_PROGRESS = 1e-8
# The second start is left when it is behind by more than so many times what its
# last sweep gained. Gains shrink from sweep to sweep, mostly; of 768 runs on 96
# pairs of small random MLPs 3 were left too early at 20 and none at 50.
_PATIENCE = 50


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

  The ascent is made from two starts, and the better end is kept. The released
  code has one, the identity, which means little for models that were trained
  apart: in the first sweep most of what it compares is noise. The other start
  visits each group once and compares only leaves whose other groups have been
  visited before, in the order in which the most is known of a group: from the
  inputs on, as a rule. It is mostly better and sometimes far worse. The start
  at the identity is left early where it falls hopelessly behind.

  Args:
    spec: the groups; see `derive` and `permutation_spec`.
    a: the model to be matched.
    b: the model to be permuted.
    key: a JAX key or an integer, for the order of the visits.
    initial: where to begin, and nowhere else; by default from both starts above,
      which costs up to twice the time.
    fixed: full-match patterns of groups that stay.
    max_iter: sweeps at most, from each start.
    progress: called after each sweep with its number and what it gained; the
      second start begins at 1 again.

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
  pairs = pairs_lib.Pairs(spec, a, b)
  staying = spec_lib.matching(spec, fixed)
  every = {n: u for n, u in pairs_lib.units(spec).items() if n not in staying}
  rng = make_rng(key)
  if initial is not None:
    spec_lib.check_permutation(spec, initial)
    start = {n: np.array(index) for n, index in initial.items()}
    return _ascend(spec, pairs, every, start, rng, max_iter, progress)[0]
  start = _first_visits(spec, pairs, every, rng)
  found, gained = _ascend(spec, pairs, every, start, rng, max_iter, progress)
  identity = spec_lib.identity(spec)
  if not any(pairs.neighbours(unit) & set(every) for unit in every.values()):
    return found  # no choice depends on another
  if all((found[n] == index).all() for n, index in identity.items()):
    return found
  ahead = pairs.objective(start) + gained - pairs.objective({})
  # With the visits that a start at the identity has by itself.
  rng = make_rng(key)
  other, gained = _ascend(
    spec, pairs, every, identity, rng, max_iter, progress, ahead
  )
  return other if gained > ahead else found


def _ascend(spec, pairs, every, start, rng, max_iter, progress, ahead=-np.inf):
  """Sweeps over the units from a start, until they would not get ahead.

  Returns:
    `(permutation, what it gained over the start)`.
  """
  permutation, total = dict(start), 0.0
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
    total += gained
    if not stale or ahead - total > _PATIENCE * gained:
      break
  return permutation, total


def objective(
  spec: spec_lib.PermutationSpec,
  a: typing.Tree,
  b: typing.Tree,
  permutation: spec_lib.Permutation | None = None,
) -> float:
  """`<a, permuted b>` over all leaves, in float64 from float32 products."""
  return pairs_lib.Pairs(spec, a, b).objective(permutation or {})


def make_rng(key: jax.Array | int) -> np.random.Generator:
  """A NumPy generator from a JAX key or an integer."""
  if isinstance(key, int):
    return np.random.default_rng(key)
  return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def _first_visits(spec, pairs, every, rng):
  """Visits each unit once, comparing what earlier visits have settled."""
  permutation = spec_lib.identity(spec)
  waiting = dict(every)
  while waiting:
    names = list(waiting)
    shares = [pairs.settled(waiting[name], waiting) for name in names]
    # Chance decides between units of which about as much is settled.
    chance = rng.uniform(0.5, 1.0, len(shares))
    unit = waiting.pop(names[np.argmax(np.asarray(shares) * chance)])
    # Of a unit of which nothing is settled everything is compared.
    found = pairs.similarities(unit, permutation, waiting) or (
      pairs.similarities(unit, permutation)
    )
    permutation |= assign(spec, unit, found, permutation)[0]
  return permutation


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


def assign(
  spec: spec_lib.PermutationSpec,
  unit: pairs_lib.Unit,
  similarities: Mapping[str | None, Any],
  permutation: spec_lib.Permutation,
) -> tuple[spec_lib.Permutation, float]:
  """Solves the assignment of a unit.

  Args:
    spec: the groups.
    unit: the leading group and its children.
    similarities: from `Pairs.similarities`.
    permutation: the one so far.

  Returns:
    `(new indices of the unit's groups, what they gain over the old ones)`.

  Raises:
    UserError: a similarity that is not finite.
  """
  host = {c: np.asarray(s, np.float64) for c, s in similarities.items()}
  for values in host.values():
    if not np.isfinite(values).all():
      raise errors.DataError(
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
    raise errors.ConfigError(
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
