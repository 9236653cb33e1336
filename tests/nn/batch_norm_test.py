# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Running statistics are those of the images, not of what fills a batch."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.analysis import norms
from mergejax.core import errors
from mergejax.core import tree
from mergejax.data import images
from mergejax.nn import vision
from mergejax.training import optim
from mergejax.training import step as step_lib


def tiny():
  config = vision.VGGConfig(
      image_shape=(4, 4, 1), classes=3, norm='batch', channels=(4, 4), dense=(),
  )  # fmt: skip
  module = vision.VGG(config)
  return module, models.family_of(module).init(jax.random.key(0))


def data(count):
  rng = np.random.default_rng(0)
  return {
    'images': rng.uniform(1, 2, (count, 4, 4, 1)).astype(np.float32),
    'labels': rng.integers(0, 3, count).astype(np.int32),
  }


def statistics(module, params, batch):
  family = models.family_of(module)
  _, changed = jax.jit(
    lambda p, b: family.call(family.variables(p), b, train=True)
  )(params, batch)
  return tree.flatten(changed['batch_stats'])


class BatchNormTest(parameterized.TestCase):
  def test_filling_does_not_count(self):
    module, params = tiny()
    (filled,) = images.batches(data(5), 8)
    self.assertEqual(filled['weights'].tolist(), [1] * 5 + [0] * 3)
    found = statistics(module, params, filled)
    alone = statistics(module, params, data(5))
    for path, leaf in alone.items():
      np.testing.assert_allclose(
        found[path], leaf, rtol=1e-5, atol=1e-7, err_msg=path
      )

    # The first norm sees a convolution: its mean and variance in float64.
    kernel = np.asarray(params['conv_0']['kernel'], np.float64)
    padded = np.pad(
      np.float64(data(5)['images']), [(0, 0), (1, 1), (1, 1), (0, 0)]
    )
    seen = sum(
      padded[:, i : i + 4, j : j + 4] @ kernel[i, j]
      for i in range(3)
      for j in range(3)
    ).reshape(-1, 4)
    np.testing.assert_allclose(
      found['norm_0/mean'], 0.1 * seen.mean(axis=0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      found['norm_0/var'], 0.9 + 0.1 * seen.var(axis=0), rtol=1e-4
    )

  def test_measured_anew_on_a_last_batch_that_is_filled(self):
    module, params = tiny()
    batches = images.batches(data(11), 8)
    self.assertLen(batches, 2)
    real = [
      {name: leaf[batch['weights'] > 0] for name, leaf in batch.items()}
      for batch in batches
    ]
    rows = lambda some: norms.refresh_norms(module, params, some * 3)
    found, expected = (tree.flatten(rows(some)) for some in (batches, real))
    for path, leaf in expected.items():
      np.testing.assert_allclose(
        found[path], leaf, rtol=1e-5, atol=1e-7, err_msg=path
      )

  def test_a_batch_of_filling_alone_measures_nothing(self):
    module, params = tiny()
    (batch,) = images.batches(data(5), 8)
    batch['weights'] = np.zeros(8, np.float32)
    for path, leaf in statistics(module, params, batch).items():
      before = tree.flatten(params)[f'batch_stats/{path}']
      np.testing.assert_array_equal(leaf, before, err_msg=path)
    optimizer = optim.adafactor(0.1)
    step = step_lib.make_step(module, optimizer)
    state = step.init(params, jax.random.key(0))
    after, metrics = jax.jit(step.update)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    self.assertEqual(float(metrics['grad_norm']), 0.0)

  def test_rows_that_the_norm_does_not_have(self):
    class Folded(nn.Module):
      config: vision.VGGConfig

      @nn.compact
      def __call__(self, images, *, train=False):
        x = images.reshape(-1, images.shape[-1])
        return nn.BatchNorm(use_running_average=not train)(x)

    module = Folded(vision.VGGConfig())
    family = models.Classifier(
      module, inputs='images', train_argument='train',
      collections=('batch_stats',),
    )  # fmt: skip
    (batch,) = images.batches(data(5), 8)
    made = module.init(jax.random.key(0), jnp.asarray(batch['images']))
    params = {**made['params'], 'batch_stats': made['batch_stats']}
    with self.assertRaisesRegex(errors.UserError, 'BatchNorm_0 .* 128 .* 8'):
      family.apply(family.variables(params), batch, train=True)


if __name__ == '__main__':
  absltest.main()
