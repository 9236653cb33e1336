# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Operations of a traced function: those of its products, loops included.

Factors and solutions of linear systems are made of products, and count too.
"""

from collections.abc import Callable
import math
from typing import Any

import jax


def products(fn: Callable[..., Any], *args: Any) -> int:
  """Operations of all products in one call of a function; see `of_jaxpr`.

  Example:
    >>> shape = jax.ShapeDtypeStruct((4, 4), 'float32')
    >>> products(lambda x: x @ x @ x, shape)
    256
  """
  return of_jaxpr(jax.make_jaxpr(fn)(*args))


def of_jaxpr(jaxpr: Any) -> int:
  """Operations of all products in one call, on all devices together.

  `2 m n k` for every product of `[m, k]` and `[k, n]`, `n^3 / 3` for a Cholesky
  factor of `[n, n]` and `n^2 m` for a triangular system with `m` right sides,
  times the steps of the scans around; what a backward pass computes anew counts
  again. Of a conditional the dearest branch counts, of a loop of unknown length
  one step. A Pallas kernel counts as often as its grid has places. Other factors,
  eigenvalues and singular values do not count.

  Args:
    jaxpr: what a function was traced to.
  """
  return _of(getattr(jaxpr, 'jaxpr', jaxpr))


def _of(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    kind, params = equation.primitive.name, equation.params
    if kind in _COUNTED:
      total += _COUNTED[kind](equation)
    elif kind == 'cond':
      total += max(_of(branch.jaxpr) for branch in params['branches'])
    else:
      times = params['length'] if kind == 'scan' else 1
      if kind == 'pallas_call':
        times = math.prod(params['grid_mapping'].grid)
      if kind == 'shard_map':  # what one device does, on each
        times = math.prod(
          params['mesh'].shape[axis] for axis in params['newly_manual_axes']
        )
      total += times * sum(map(_of, _inner(params)))
  return total


def _inner(params):
  """Jaxprs among the parameters of an equation."""
  for value in params.values():
    for each in value if isinstance(value, (list, tuple)) else (value,):
      inner = getattr(each, 'jaxpr', each)
      if hasattr(inner, 'eqns'):
        yield inner


def _dot(equation):
  (contracting, _), _ = equation.params['dimension_numbers']
  left = equation.invars[0].aval.shape
  size = math.prod(equation.outvars[0].aval.shape)
  return 2 * size * math.prod(left[i] for i in contracting)


def _convolution(equation):
  numbers = equation.params['dimension_numbers']
  kernel = equation.invars[1].aval.shape
  outputs = kernel[numbers.rhs_spec[0]]
  size = math.prod(equation.outvars[0].aval.shape)
  return 2 * size * math.prod(kernel) // outputs


def _cholesky(equation):
  shape = equation.invars[0].aval.shape
  return math.prod(shape) * shape[-1] // 3


def _triangular_solve(equation):
  triangle, given = (variable.aval.shape for variable in equation.invars)
  return math.prod(given) * triangle[-1]


_COUNTED = {
  'dot_general': _dot,
  'conv_general_dilated': _convolution,
  'cholesky': _cholesky,
  'triangular_solve': _triangular_solve,
}
