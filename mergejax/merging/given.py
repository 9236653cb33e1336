# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics that are given to a merge: as many and as complete as it needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import statistic_specs
from mergejax.core import typing
from mergejax.merging import finite
from mergejax.methods import base as base_lib


def check(
  method: base_lib.Merge,
  stats: Sequence[Mapping[typing.Path, Any]] | None,
  names: Sequence[str],
  paths: Sequence[typing.Path],
  specs: typing.SpecTree,
) -> list[Mapping[typing.Path, Any]]:
  """Statistics of every model, as many and as complete as the method needs.

  Raises:
    UserError: none given where they are needed, a wrong number, a path that no
      model has, leaves that some models have statistics of and others not, or
      shapes and values that cannot be.
  """
  if not method.needs:
    return [{} for _ in names]
  needs = method.statistics
  kind = needs[0].name
  if stats is None or len(stats) != len(names):
    given = 'none' if stats is None else len(stats)
    raise errors.DataError(
      f'This method needs the {kind} statistics of every model: {len(names)} '
      f'models, {given} given. Collect them with mj.stats.collect, or '
      '`mergejax stats`.'
    )
  have = {path for one in stats for path in one}
  lines = [f'{p}: no model has such a leaf' for p in sorted(have - set(specs))]
  have &= set(paths)
  wanted = set(paths) if any(n.required == 'all' for n in needs) else have
  for path in sorted(wanted):
    must = [n for n in needs if n.required == 'all' or path in have]
    shapes = [need.shape(path, specs[path]) for need in must]
    for name, one in zip(names, stats):
      own = one.get(path, {})
      lacks = [need.name for need in must if need.name not in own]
      if lacks:
        lines.append(f'{path}: {name} lacks its {lacks[0]}')
        continue
      for need, shape in zip(must, shapes):
        lines += _misfit(path, specs[path], name, need, shape, own[need.name])
  if not have:
    lines.append(f'no leaf has {kind} statistics')
  if lines:
    raise errors.DataError(
      f'The {kind} statistics do not fit the models:\n{errors.listed(lines)}'
    )
  return list(stats)


def _misfit(path, spec, name, need, shape, found):
  """What is wrong with a statistic of one leaf of one model."""
  if not statistic_specs.matches(tuple(found.shape), shape):
    return [
      f'{path}: {name} has {need.name} {list(found.shape)}, which does not fit '
      f'{list(spec.shape)}'
    ]
  if need.values == 'any' or numerics.is_traced(found):
    return []
  if finite.first_bad([found]) is not None:
    return [
      f'{path}: the {need.name} of {name} has numbers that are not finite'
    ]
  fault = unsound(need, found)
  return [f'{path}: the {need.name} of {name} {fault}'] if fault else []


def unsound(
  need: statistic_specs.StatisticSpec, found: typing.Array
) -> str | None:
  """What of the numbers of a statistic cannot be, in words; None if nothing.

  Args:
    need: what the statistic is.
    found: <float>[...], of which nothing is traced.
  """
  if need.values not in ('nonnegative', 'positive semidefinite'):
    return None
  if need.values == 'nonnegative' and isinstance(found, np.ndarray):
    return None if np.all(found >= 0) else 'has negative entries'
  with jax.ensure_compile_time_eval():  # numbers are known, also under jit
    checked = jnp.asarray(found)
    if need.values == 'positive semidefinite':
      if not symmetric(checked):
        return 'is not symmetric, as X^T X is'
      checked = jnp.diagonal(checked, axis1=-2, axis2=-1)
    return None if bool(jnp.all(checked >= 0)) else 'has negative entries'


def symmetric(gram: typing.Array) -> bool:
  """Whether a Gram matrix, or each of a stack, equals its transpose.

  Up to a thousandth of its largest entry, which any summation in half precision
  keeps.
  """
  wide = jnp.asarray(gram).astype(jnp.float32)
  apart = jnp.max(jnp.abs(wide - jnp.swapaxes(wide, -1, -2)))
  # What is not finite is told of by other checks.
  return not bool(apart > 1e-3 * jnp.max(jnp.abs(wide)))
