# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics that are given to a merge: as many and as complete as it needs."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing
from mergejax.merging import finite
from mergejax.methods import base as base_lib

# Statistics with the axes of the stack in front: one matrix, or one number, for
# each layer. All others lie like their leaf.
STACK_FIRST = ('gram', 'count')


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
  kind = method.needs[0]
  if stats is None or len(stats) != len(names):
    given = 'none' if stats is None else len(stats)
    raise errors.DataError(
      f'This method needs the {kind} statistics of every model: {len(names)} '
      f'models, {given} given. Collect them with mj.stats.collect, or '
      '`mergejax stats`.'
    )
  lines = []
  some = {path for one in stats for path in one}
  lines += [f'{p}: no model has such a leaf' for p in sorted(some - set(specs))]
  some &= set(paths)
  wanted = set(paths) if kind == 'fisher' else some
  for name, one in zip(names, stats):
    for path in sorted(wanted):
      lacks = [n for n in method.needs if n not in one.get(path, {})]
      if lacks:
        lines.append(f'{path}: {name} lacks its {lacks[0]}')
      elif path in specs:
        for need in method.needs:
          lines += _misfit(path, specs[path], name, need, one[path][need])
  if not some:
    lines.append(f'no leaf has {kind} statistics')
  if lines:
    raise errors.DataError(
      f'The {kind} statistics do not fit the models:\n{errors.listed(lines)}'
    )
  return list(stats)


def _misfit(path, spec, name, kind, found):
  """What is wrong with the statistics of one leaf of one model."""
  fits = tuple(found.shape) == spec.shape
  if kind in STACK_FIRST:
    view = axes_lib.view(path, spec)
    width = math.prod(spec.shape[i] for i in view.inputs)
    stack = tuple(spec.shape[i] for i in view.stack)
    sizes = (width, width) if kind == 'gram' else ()
    fits = tuple(found.shape) == stack + sizes
  if not fits:
    return [
      f'{path}: {name} has {kind} {list(found.shape)}, which does not fit '
      f'{list(spec.shape)}'
    ]
  if kind not in ('fisher', 'gram') or numerics.is_traced(found):
    return []
  if finite.first_bad([found]) is not None:
    return [f'{path}: the {kind} of {name} has numbers that are not finite']
  with jax.ensure_compile_time_eval():  # numbers are known, also under jit
    own = jnp.asarray(found)
    if kind == 'gram' and not symmetric(own):
      return [f'{path}: the gram of {name} is not symmetric, as X^T X is']
    if kind == 'gram':
      own = jnp.diagonal(own, axis1=-2, axis2=-1)
    sound = bool(jnp.all(own >= 0))
  if not sound:
    return [f'{path}: the {kind} of {name} has negative entries']
  return []


def symmetric(gram: typing.Array) -> bool:
  """Whether a Gram matrix, or each of a stack, equals its transpose.

  Up to a thousandth of its largest entry, which any summation in half precision
  keeps.
  """
  wide = jnp.asarray(gram).astype(jnp.float32)
  apart = jnp.max(jnp.abs(wide - jnp.swapaxes(wide, -1, -2)))
  # What is not finite is told of by other checks.
  return not bool(apart > 1e-3 * jnp.max(jnp.abs(wide)))
