# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear systems of positive definite matrices, also of those on many devices.

Libraries of the CPU and of the GPU factor a matrix whole, on one device. A TPU
has none: XLA unrolls a Cholesky factor into one piece of program for every 128
rows and divides each of them over the mesh, which takes minutes to hours to
compile and sends little things all the time. `by_blocks` is a loop instead, of
one size for every matrix.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy import linalg

from mergejax import partition
from mergejax.core import numerics
from mergejax.core import typing

# Rows that are eliminated together. Fewer make more rounds, each of which waits
# for the network; more make more work that every device repeats.
_BLOCK = 256
_LARGEST_BLOCK = 1024


def solve(
  matrix: typing.Array, right: typing.Array
) -> tuple[typing.Array, typing.Array]:
  """The solution of `matrix @ x = right` by Cholesky factors.

  Args:
    matrix: <float>[n, n], symmetric and positive definite.
    right: <float>[n, m].

  Returns:
    `(x, pivots)`: <float>[n, m], and <float>[n], the squared diagonal of the
    factor, whose ratios never exceed the condition number. Not a number where
    the matrix is not positive definite.

  Example:
    >>> x, pivots = solve(jnp.diag(jnp.array([4.0, 1.0])), jnp.ones((2, 1)))
    >>> x.ravel().tolist(), pivots.tolist()
    ([0.25, 1.0], [4.0, 1.0])
  """
  mesh, platform = _where(matrix)
  if platform != 'tpu':
    factor = linalg.cho_factor(matrix, lower=True)
    pivots = jnp.square(jnp.diagonal(factor[0]))
    return linalg.cho_solve(factor, right), pivots
  devices = 1 if mesh is None else mesh.size
  block = min(max(_BLOCK, devices), _LARGEST_BLOCK, len(matrix))
  return by_blocks(matrix, right, block=block, mesh=mesh)


def product(matrix: typing.Array, right: typing.Array) -> typing.Array:
  """`matrix @ right` in full precision.

  On a mesh every device is given all of the right side for its rows of the
  matrix: of kernels and their Gram matrices, what was trained in few bits and
  is the smaller.

  Args:
    matrix: <float>[n, n].
    right: <float>[n, m].

  Returns:
    <float>[n, m].
  """
  mesh, platform = _where(matrix)
  return _matmul(matrix, right, mesh if platform == 'tpu' else None)


@functools.partial(jax.jit, static_argnames=('mesh',))
def _matmul(matrix, right, mesh):
  whole, spread = _layouts(mesh)
  rows = spread(matrix, 0)
  return spread(_product('ij,jm->im', rows, whole(right)), 0)


@functools.partial(jax.jit, static_argnames=('block', 'mesh'))
def by_blocks(
  matrix: typing.Array,
  right: typing.Array,
  *,
  block: int,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[typing.Array, typing.Array]:
  """`solve`, `block` rows at a time, in a program that does not grow with n.

  With `s = n / block`, a round eliminates the rows `k, s + k, 2 s + k, ...`: as
  many devices as divide `block` have their part of every round. On a mesh the
  rows of the matrix and the columns of the right side are spread over all of
  it, and every device is given the rows of a round, `block n` numbers, and no
  more: over all rounds the matrix once, and once on the way back.

  Args:
    matrix: see `solve`.
    right: see `solve`.
    block: rows of a round; the system is filled up to a multiple of it.
    mesh: where they lie, if they are spread.

  Returns:
    See `solve`.

  Source: the right-looking block Cholesky factorization of Golub and Van Loan,
  "Matrix Computations" (4th edition, 2013), section 4.2.9, in an order of rows
  that Cholesky factors leave open.
  """
  size, rounds = len(matrix), -(-len(matrix) // block)
  empty = rounds * block - size
  whole, spread = _layouts(mesh)
  if empty:
    fill = jnp.arange(rounds * block) >= size
    matrix = jnp.pad(matrix, ((0, empty), (0, empty)))
    matrix = matrix + jnp.diag(fill.astype(matrix.dtype))
    right = jnp.pad(right, ((0, empty), (0, 0)))
  # [n, n] -> [block, rounds, block, rounds], [n, m] -> [block, rounds, m]
  matrix = spread(matrix.reshape(block, rounds, block, rounds), 0)
  right = spread(right.reshape(block, rounds, -1), 2)
  one = whole(jnp.eye(block, dtype=matrix.dtype))

  def eliminate(k, state):
    matrix, right, pivots = state
    rows, sides = whole(_at(matrix, k, 1)), _at(right, k, 1)
    factor = whole(jnp.linalg.cholesky(whole(_at(rows, k, 2))))
    inverse = whole(linalg.solve_triangular(factor, one, lower=True))
    later = jnp.where(jnp.arange(rounds) > k, rows, 0)
    later = whole(_product('ij,jck->ick', inverse, later))
    sides = _product('ij,jm->im', inverse, sides)
    matrix = matrix - _product('ibk,icl->bkcl', later, later)
    right = right - _product('ibk,im->bkm', later, sides)
    # The factor is not kept: these rows now say what each unknown of the round
    # is, given the later ones.
    later = _product('ij,ick->jck', inverse, later)
    matrix = jax.lax.dynamic_update_index_in_dim(matrix, later, k, 1)
    sides = _product('ij,im->jm', inverse, sides)
    right = jax.lax.dynamic_update_index_in_dim(right, sides, k, 1)
    pivots = pivots.at[:, k].set(jnp.square(jnp.diagonal(factor)))
    return matrix, right, pivots

  def substitute(i, right):
    k = rounds - 2 - i
    rows = whole(_at(matrix, k, 1))
    found = _at(right, k, 1) - _product('ick,ckm->im', rows, right)
    return jax.lax.dynamic_update_index_in_dim(right, found, k, 1)

  pivots = jnp.zeros((block, rounds), matrix.dtype)
  matrix, right, pivots = jax.lax.fori_loop(
    0, rounds, eliminate, (matrix, right, pivots)
  )
  right = jax.lax.fori_loop(0, rounds - 1, substitute, right)
  found = right.reshape(block * rounds, -1)
  return found[:size], pivots.reshape(-1)[:size]


def _layouts(mesh):
  """How to lay an array whole on every device, or one of its axes over all."""
  if mesh is None:
    return lambda x: x, lambda x, axis: x

  def lay(x, axis=None):
    spec = [mesh.axis_names if i == axis else None for i in range(x.ndim)]
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, layout)

  return lay, lay


def _at(array, place, axis):
  return jax.lax.dynamic_index_in_dim(array, place, axis, keepdims=False)


def _product(subscripts, *arrays):
  return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)


def _where(matrix):
  """The mesh that a matrix is spread over, or None, and the platform."""
  if numerics.is_traced(matrix):
    return partition.active_mesh(), partition.platform()
  layout = getattr(matrix, 'sharding', None)
  if layout is None:
    return None, jax.default_backend()
  mesh = layout.mesh if isinstance(layout, jax.sharding.NamedSharding) else None
  return mesh, next(iter(layout.device_set)).platform
