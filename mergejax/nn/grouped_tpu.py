# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows by the TPU compiler's kernel, in tiles that fit.

The tiles that it chooses by itself take more than the fast memory of a core for
kernels as wide as Switch-Base's, and it refuses the program; for a few rows that
no tile divides it stops the process.
"""

from typing import Any

import jax
from jax import lax
from jax.experimental import xla_metadata
import jax.numpy as jnp

from mergejax.core import typing

# Of the rows; of what is summed and of what is made. Two of each tile and a sum
# in float32 stay below 16 MiB, of wide dtypes with half the width.
_ROWS, _WIDTH = 512, 1024
# Rows of a tile come in multiples of these, and the width in multiples of those.
_SUBLANES, _LANES = 16, 128

_OF_ROWS = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_OF_KERNELS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def tiled_dot(
  rows: typing.Array, kernels: typing.Array, sizes: typing.Array
) -> jax.Array:
  """`grouped.grouped_dot` of the same arguments, see there."""
  count = len(rows)
  more = -count % _row_tile(count)
  found = _dot(jnp.pad(rows, ((0, more), (0, 0))), kernels, sizes)
  return found[:count]


@jax.custom_vjp
def _dot(rows, kernels, sizes):
  return _tiled(_OF_ROWS, kernels.shape[1:], rows, kernels, sizes)


def _kept(rows, kernels, sizes):
  return _dot(rows, kernels, sizes), (rows, kernels, sizes)


def _gradients(kept, given):
  rows, kernels, sizes = kept
  widths = kernels.shape[1:]
  # Along the other axis of a kernel the compiler would forget the tiles.
  of_rows = _tiled(
    _OF_ROWS, widths[::-1], given, jnp.swapaxes(kernels, 1, 2), sizes
  )
  of_kernels = _tiled(_OF_KERNELS, widths, rows, given, sizes)
  return of_rows, of_kernels, None


_dot.defvjp(_kept, _gradients)


def _tiled(dimensions, widths, rows, others, sizes):
  narrow = rows.dtype.itemsize <= 2
  tiles = [_width_tile(n, _WIDTH if narrow else _WIDTH // 2) for n in widths]
  told: dict[str, Any] = {}
  if all(tiles):
    told['ragged_dot_tiling'] = ','.join(
      str(tile) for tile in (_row_tile(len(rows)), *tiles)
    )
  with xla_metadata.set_xla_metadata(**told):
    return lax.ragged_dot_general(rows, others, sizes, dimensions)


def _row_tile(count):
  return min(_ROWS, max(-(-count // _SUBLANES), 1) * _SUBLANES)


def _width_tile(size, most):
  """The widest tile that divides a size; None if there is none."""
  if size <= most:
    return size
  fits = (n for n in range(most, 0, -_LANES) if size % n == 0)
  return next(fits, None)
