# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Running statistics against means over the real rows of the data."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.analysis import norms
from mergejax.core import errors
from mergejax.core import tree


class NormsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.module = models.build(
      dict(model_type='resnet', stages=(1,), channels=(3,), norm='batch',
           image_shape=(4, 4, 1))
    )  # fmt: skip
    self.params = models.family_of(self.module).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    # Rows grow, so that the cut into batches would tell.
    self.images = rng.normal(size=(19, 4, 4, 1)) + 0.2 * np.arange(19).reshape(
      -1, 1, 1, 1
    )
    self.images = self.images.astype(np.float32)

  def batch(self, start, stop, size, filling=0.0):
    rows = self.images[start:stop]
    left = size - len(rows)
    return {
      'images': np.pad(
        rows, ((0, left), (0, 0), (0, 0), (0, 0)), constant_values=filling
      ),
      'labels': np.zeros(size, np.int32),
      'weights': (np.arange(size) < len(rows)).astype(np.float32),
    }

  def first_norm(self):
    """Mean and variance of the stem's outputs, by hand in float64."""
    kernel = np.float64(self.params['stem']['kernel'])
    padded = np.pad(np.float64(self.images), ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = np.stack([
      np.einsum('bhwc,hwco->bo', padded[:, i : i + 3, j : j + 3], kernel)
      for i in range(4) for j in range(4)
    ])  # fmt: skip
    return seen.mean(axis=(0, 1)), seen.var(axis=(0, 1))

  def test_the_batchs_own(self):
    batch = self.batch(0, 16, 16)
    fresh = norms.refresh_norms(self.module, self.params, [batch] * 2)
    # With the batch's own statistics both modes agree.
    family = models.family_of(self.module)
    expected = family.apply(family.variables(self.params), batch, train=True)
    np.testing.assert_allclose(
      family.logits(fresh, batch), expected.logits, rtol=1e-4, atol=1e-5
    )
    for name in self.params:
      if name != 'batch_stats':
        jax.tree.map(
          np.testing.assert_array_equal, fresh[name], self.params[name]
        )
    plain = {'w': np.ones(2)}
    self.assertIs(norms.refresh_norms(self.module, plain, [batch]), plain)

  def test_filling_and_the_cut_do_not_count(self):
    mean, variance = self.first_norm()
    stats = tree.flatten(self.params['batch_stats'])
    (path,) = [p for p in stats if 'stem' in p and p.endswith('mean')]
    for batches in (
      [self.batch(0, 8, 8), self.batch(8, 16, 8), self.batch(16, 19, 8)],
      [self.batch(0, 8, 8, np.nan), self.batch(8, 19, 16, np.inf)],
      [self.batch(0, 0, 8), self.batch(0, 19, 19)],
    ):
      fresh = norms.refresh_norms(self.module, self.params, batches)
      found = tree.flatten(fresh['batch_stats'])
      np.testing.assert_allclose(found[path], mean, rtol=1e-5)
      np.testing.assert_allclose(
        found[path.replace('mean', 'var')], variance, rtol=1e-4
      )
      self.assertEqual(
        jax.tree.map(jnp.shape, fresh), jax.tree.map(jnp.shape, self.params)
      )

  def test_bad_data(self):
    half = self.batch(0, 8, 8)
    half['weights'] *= np.float32(0.5)
    broken = {**self.batch(0, 4, 4), 'images': np.full((4, 4, 4, 1), np.nan)}
    for batches, message in (
      ([half], '0 or 1'), ([self.batch(0, 0, 4)], 'no real row'),
      ([], 'no real row'), ([broken], 'not finite'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        norms.refresh_norms(self.module, self.params, batches)


if __name__ == '__main__':
  absltest.main()
