# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Image classifiers: shapes, bytes, norms, training."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiers

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import objective
from mergejax.training import step as step_lib

SMALL = dict(image_shape=(8, 8, 1), classes=3)
MODELS = (
  ('mlp', dict(model_type='mlp', hidden=(5,), **SMALL)),
  ('vgg', dict(model_type='vgg', channels=(4, 0, 4), dense=(5,), **SMALL)),
  ('batch', dict(model_type='resnet', stages=(1, 1), channels=(3, 4),
                 norm='batch', **SMALL)),
  ('vit', dict(model_type='vit', patch=4, emb_dim=6, num_heads=2,
               num_layers=1, mlp_dim=5, **SMALL)),
)  # fmt: skip


@tiers.slow('test_learns_.*_(mlp|vgg)')
class VisionTest(parameterized.TestCase):
  @parameterized.named_parameters(*MODELS)
  def test_learns_and_describes_itself(self, fields):
    module = models.build(fields)
    self.assertEqual(models.build(models.describe(module)), module)
    family = models.family_of(module)
    params = family.init(jax.random.key(0))
    labels = np.arange(24) % 3
    images = np.zeros((24, 8, 8, 1), np.float32)
    images[np.arange(24), :, labels * 2] = 1.0
    batch = {'images': images, 'labels': labels}
    optimizer = optax.sgd(0.1)
    made = step_lib.make_step(
      module, optimizer, objective=objective.cross_entropy(z_loss=0.0)
    )
    step = jax.jit(made.update)
    state = made.init(params, jax.random.key(0))
    state, first = step(state, batch)
    for _ in range(80):
      state, last = step(state, batch)
    self.assertLess(float(last['loss']), 0.9 * float(first['loss']))
    if fields.get('norm') == 'batch':
      moved = state.params['batch_stats']['stem_norm']['mean']
      self.assertGreater(float(jnp.abs(moved).max()), 0)
      self.assertNotIn('batch_stats', last)
    specs = family.specs()
    for path, spec in tree.specs(state.params).items():
      self.assertEqual(spec, dataclasses.replace(specs.pop(path), axes=None))
    self.assertEmpty(specs)
    self.assertTrue(all(spec.axes for spec in family.specs().values()))

  def test_bytes_and_grey_images(self):
    module = models.build(MODELS[1][1])
    family = models.family_of(module)
    params = family.init(jax.random.key(0))
    images = (
      np.random.default_rng(0).integers(0, 256, (2, 8, 8)).astype(np.uint8)
    )
    logits = jax.jit(family.logits)
    as_bytes = logits(params, {'images': images})
    floats = np.float32(images)[..., None] / 255
    as_floats = logits(params, {'images': floats})
    np.testing.assert_allclose(as_bytes, as_floats, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(
    (dict(model_type='vgg', image_shape=(32, 32, 3)), 15_245_130, 13),
    (dict(model_type='resnet'), 270_282, 19),
    (dict(model_type='resnet', stages=(3, 4, 6, 3),
          channels=(64, 128, 256, 512), bottleneck=True, large_stem=True,
          image_shape=(224, 224, 3), classes=1000, norm='layer'),
     25_557_032, 49),
  )  # fmt: skip
  def test_sizes_are_those_of_the_architectures(self, fields, size, convs):
    specs = models.family_of(models.build(fields)).specs()
    found = sum(spec.size for spec in specs.values())
    self.assertLess(abs(found - size) / size, 0.02)
    kernels = [p for p, s in specs.items() if len(s.shape) == 4]
    plain = [p for p in kernels if 'shortcut' not in p]
    self.assertLen(plain, convs)

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.UserError, "'layer'"):
      models.build(dict(model_type='vgg', norm='layers'))
    with self.assertRaisesRegex(errors.UserError, 'of one length'):
      models.build(dict(model_type='resnet', stages=(3, 4, 6, 3)))


if __name__ == '__main__':
  absltest.main()
