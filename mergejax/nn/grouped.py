# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows with a kernel each, of sizes known at run time.

`jax.lax.ragged_dot` is that product. On accelerators it is a kernel of its own,
whose tiles `grouped_tpu` chooses; on CPU it is as many dense products of all rows as there are kernels, so there
the same numbers are made by loops over blocks of rows.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import typing
from mergejax.nn import grouped_tpu

# Rows that are multiplied at a time on CPU: enough that a kernel is read for
# many of them, few enough that little is computed beyond the end of a group.
_BLOCK = 128
# Gradients of kernels are sums over rows: of so many blocks at once, rather
# than read and written anew for each.
_BLOCKS = 8


def spare_rows(rows: int) -> int:
  """How many rows should lie behind the groups of so many rows, all 0.

  Groups with fewer behind them are copied to make room.
  """
  return min(_BLOCK, rows) if partition.platform() == 'cpu' else 0


def grouped_dot(
  rows: typing.Array,
  kernels: typing.Array,
  sizes: typing.Array,
  *,
  spare: int = 0,
) -> jax.Array:
  """`rows[i] @ kernels[g]` for every row i of group g, groups one after another.

  Differentiable with respect to rows and kernels (reverse mode).

  Args:
    rows: `<float>[rows, in]`; those behind the last group must be 0.
    kernels: `<float>[groups, in, out]` of the dtype of the rows.
    sizes: `<int32>[groups]` how many rows each group has; their sum may be
      smaller than the number of rows.
    spare: how many rows are behind the last group in any case, see
      `spare_rows`.

  Returns:
    `<float>[rows, out]`; 0 behind the last group.

  Example:
    >>> kernels = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_dot(jnp.ones((3, 2)), kernels, jnp.array([2, 1])).tolist()
    [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]
  """
  platform = partition.platform()
  if platform == 'tpu':
    return grouped_tpu.tiled_dot(rows, kernels, sizes)
  if platform != 'cpu':
    return jax.lax.ragged_dot(rows, kernels, sizes)
  count = len(rows)
  more = max(spare_rows(count) - spare, 0)
  found = _blocked_dot(jnp.pad(rows, ((0, more), (0, 0))), kernels, sizes)
  if not more:
    return found
  # Of what is behind the last group there must be no gradient either.
  inside = jnp.arange(count) < jnp.sum(sizes)
  return jnp.where(inside[:, None], found[:count], 0)


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


def _by_block(rows, kernels, sizes, contract):
  """Every row times the kernel of its group, which is contracted along an axis.

  A block may reach beyond its group: the next group writes over that, and
  behind the last one rows are 0.
  """
  block = _block(rows)

  def of_group(g, start, size, found):
    kernel = jax.lax.dynamic_index_in_dim(kernels, g, 0, keepdims=False)

    def write(i, found):
      at = start + i * block
      product = jax.lax.dot_general(
        _at(rows, at, block), kernel, (((1,), (contract,)), ((), ()))
      )
      return jax.lax.dynamic_update_slice_in_dim(found, product, at, 0)

    return jax.lax.fori_loop(0, _blocks(size, block), write, found)

  features = kernels.shape[2 - contract]
  return _groups(sizes, of_group, jnp.zeros((len(rows), features), rows.dtype))


@jax.custom_batching.sequential_vmap
def _of_kernels(rows, given, sizes):
  """`rows_g^T given_g` of every group, `[groups, in, out]`."""
  block = _block(rows)
  most = max(min(_BLOCKS, len(rows) // block), 1)
  shape = rows.shape[1], given.shape[1]

  def part(blocks, start, size):
    """Of the first rows of a group, up to so many blocks of them."""
    if not blocks:
      return jnp.zeros(shape, jnp.float32)
    count = blocks * block
    # A part that would reach beyond the end is moved to the front instead.
    begin = jnp.minimum(start, len(rows) - count)
    place = begin - start + jnp.arange(count)
    mine = ((place >= 0) & (place < size))[:, None]
    return jax.lax.dot_general(
      jnp.where(mine, _at(rows, begin, count), 0), _at(given, begin, count),
      (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32,
    )  # fmt: skip

  def of_group(g, start, size, found):
    whole = size // (most * block)
    done = whole * most * block
    total = jax.lax.switch(
      _blocks(size - done, block),
      [functools.partial(part, blocks) for blocks in range(most + 1)],
      start + done, size - done,
    )  # fmt: skip
    add = lambda i, total: (
      total + part(most, start + i * most * block, most * block)
    )
    total = jax.lax.fori_loop(0, whole, add, total)
    return jax.lax.dynamic_update_index_in_dim(
      found, total.astype(found.dtype), g, 0
    )

  return _groups(sizes, of_group, jnp.zeros((len(sizes), *shape), rows.dtype))


def _groups(sizes, of_group: Callable, found):
  starts = jnp.cumsum(sizes) - sizes
  return jax.lax.fori_loop(
    0, len(sizes), lambda g, found: of_group(g, starts[g], sizes[g], found),
    found,
  )  # fmt: skip


def _block(rows):
  return min(_BLOCK, (len(rows) + 1) // 2)


def _blocks(size, block):
  return (size + block - 1) // block


def _at(rows, start, count):
  return jax.lax.dynamic_slice_in_dim(rows, start, count)
