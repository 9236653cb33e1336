# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Products in tiles: the numbers on any platform, and what a core has room for."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.nn import grouped_tpu

FAST_MEMORY = 16 * 2**20


def tilings(dtype, count, widths, groups=2):
  """`[(rows, in, out)]` that the compiler is told, forward and backward."""
  rows = jax.ShapeDtypeStruct((count, widths[0]), dtype)
  kernels = jax.ShapeDtypeStruct((groups, *widths), dtype)
  sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

  def loss(rows, kernels, sizes):
    return jnp.sum(grouped_tpu.tiled_dot(rows, kernels, sizes) ** 2)

  traced = jax.jit(jax.grad(loss, (0, 1))).trace(rows, kernels, sizes)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  found = re.findall(r'ragged_dot_tiling = "([\d,]+)"', text)
  return [tuple(map(int, tiles.split(','))) for tiles in found]


class TiledTest(parameterized.TestCase):
  @parameterized.parameters(
    (40, (7, 20, 13)), (5, (0, 2, 1)), (600, (0, 599, 1)), (3, (0, 0, 0)),
  )  # fmt: skip
  def test_values_and_gradients(self, count, sizes):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 6)).astype(np.float32)
    rows[sum(sizes) :] = 0
    kernels = rng.normal(size=(3, 6, 5)).astype(np.float32)
    given = rng.normal(size=(count, 5)).astype(np.float32)

    def both(rows, kernels, given):
      fn = lambda rows, kernels: grouped_tpu.tiled_dot(
        rows, kernels, jnp.int32(sizes)
      )
      outputs, pull = jax.vjp(fn, rows, kernels)
      return outputs, *pull(given)

    found = jax.jit(both)(rows, kernels, given)
    wanted = [np.zeros((count, 5)), np.zeros((count, 6)), np.zeros((3, 6, 5))]
    ends = np.cumsum(sizes)
    for g, end in enumerate(ends):
      own = slice(end - sizes[g], end)
      wanted[0][own] = rows[own] @ kernels[g]
      wanted[1][own] = given[own] @ kernels[g].T
      wanted[2][g] = rows[own].T @ given[own]
    for one, other in zip(found, wanted):
      np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)

  @hypothesis.given(
    dtype=st.sampled_from(('bfloat16', 'float32')),
    count=st.integers(1, 5000),
    widths=st.tuples(*[st.integers(1, 90).map(lambda n: 128 * n)] * 2),
  )
  @hypothesis.settings(max_examples=25, deadline=None)
  def test_tiles_divide_and_fit(self, dtype, count, widths):
    dtype = jnp.dtype(dtype)
    found = tilings(dtype, count, widths)
    self.assertLen(found, 3)  # the product, and both of its gradients
    for tiles, sides in zip(found, (widths, widths[::-1], widths)):
      self.assertEqual(tiles[0] % 16, 0)
      for tile, size in zip(tiles[1:], sides):
        self.assertEqual(size % tile, 0)
      m, k, n = tiles
      for summed, left, right in ((k, m, n), (m, k, n)):
        parts = left * summed + summed * right + left * right
        self.assertLess(
          2 * dtype.itemsize * parts + 4 * left * right, FAST_MEMORY
        )

  def test_widths_that_no_tile_divides_are_the_compilers(self):
    self.assertEmpty(tilings(jnp.float32, 8, (1500, 300)))


if __name__ == '__main__':
  absltest.main()
