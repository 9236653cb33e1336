# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows with a kernel each, of sizes known at run time.

`jax.lax.ragged_dot` is that product. On accelerators it is a kernel of its own;
on CPU it is as many dense products of all rows as there are kernels, so there
the same numbers are made by loops over blocks of rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import typing

# Rows that are multiplied at a time on CPU: enough that a kernel is read for
# many of them, few enough that little is computed beyond the end of a group.
_BLOCK = 128


def grouped_dot(
  rows: typing.Array, kernels: typing.Array, sizes: typing.Array
) -> jax.Array:
  """`rows[i] @ kernels[g]` for every row i of group g, groups one after another.

  Differentiable with respect to rows and kernels (reverse mode).

  Args:
    rows: `<float>[rows, in]`; those behind the last group must be 0.
    kernels: `<float>[groups, in, out]` of the dtype of the rows.
    sizes: `<int32>[groups]` how many rows each group has; their sum may be
      smaller than the number of rows.

  Returns:
    `<float>[rows, out]`; 0 behind the last group.

  Example:
    >>> kernels = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_dot(jnp.ones((3, 2)), kernels, jnp.array([2, 1])).tolist()
    [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]
  """
  if partition.platform() == 'cpu':
    return _blocked_dot(rows, kernels, sizes)
  return jax.lax.ragged_dot(rows, kernels, sizes)


@jax.custom_vjp
def _blocked_dot(rows, kernels, sizes):
  return _forward(rows, kernels, sizes)


def _kept(rows, kernels, sizes):
  return _forward(rows, kernels, sizes), (rows, kernels, sizes)


def _gradients(kept, given):
  rows, kernels, sizes = kept
  of_rows = _backward(given, kernels, sizes)
  return of_rows, _of_kernels(rows, given, sizes), None


_blocked_dot.defvjp(_kept, _gradients)


# Side by side, loops of different lengths would each run as long as the longest
# and keep copies of what they have: one after the other is faster.
@jax.custom_batching.sequential_vmap
def _forward(rows, kernels, sizes):
  return _by_block(rows, kernels, sizes, contract=0)


@jax.custom_batching.sequential_vmap
def _backward(rows, kernels, sizes):
  return _by_block(rows, kernels, sizes, contract=1)


@jax.custom_batching.sequential_vmap
def _of_kernels(rows, given, sizes):
  """`rows_g^T given_g` of every group, `[groups, in, out]`."""
  block = min(_BLOCK, len(rows))
  rows, given = _longer(rows, block), _longer(given, block)
  shape = rows.shape[1], given.shape[1]

  def of_group(g, start, size, found):
    def add(i, total):
      at = start + i * block
      mine = (i * block + jnp.arange(block) < size)[:, None]
      part = jnp.where(mine, _at(rows, at, block), 0)
      product = jax.lax.dot_general(
        part, _at(given, at, block), (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )  # fmt: skip
      return total + product

    total = _blocks(size, block, add, jnp.zeros(shape, jnp.float32))
    return jax.lax.dynamic_update_index_in_dim(
      found, total.astype(found.dtype), g, 0
    )

  return _groups(sizes, of_group, jnp.zeros((len(sizes), *shape), rows.dtype))


def _by_block(rows, kernels, sizes, contract):
  """Every row times the kernel of its group, which is contracted along an axis.

  A block may reach beyond its group; the next group writes over that, and
  behind the last one rows are 0.
  """
  count = len(rows)
  block = min(_BLOCK, count)
  rows = _longer(rows, block)

  def of_group(g, start, size, found):
    kernel = jax.lax.dynamic_index_in_dim(kernels, g, 0, keepdims=False)

    def write(i, found):
      at = start + i * block
      product = jax.lax.dot_general(
        _at(rows, at, block), kernel, (((1,), (contract,)), ((), ()))
      )
      return jax.lax.dynamic_update_slice_in_dim(found, product, at, 0)

    return _blocks(size, block, write, found)

  features = kernels.shape[2 - contract]
  empty = jnp.zeros((len(rows), features), rows.dtype)
  return _groups(sizes, of_group, empty)[:count]


def _groups(sizes, of_group: Callable, found):
  starts = jnp.cumsum(sizes) - sizes
  return jax.lax.fori_loop(
    0, len(sizes), lambda g, found: of_group(g, starts[g], sizes[g], found),
    found,
  )  # fmt: skip


def _blocks(size, block, body: Callable, found):
  return jax.lax.fori_loop(0, (size + block - 1) // block, body, found)


def _longer(rows, block):
  return jnp.pad(rows, ((0, block), (0, 0)))


def _at(rows, start, block):
  return jax.lax.dynamic_slice_in_dim(rows, start, block)
