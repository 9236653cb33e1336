# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Collected on the model and merged: kernels of several axes, by their advice."""

from absl.testing import absltest
import flax.linen as nn
import jax
import numpy as np

import mergejax as mj
from mergejax import statistics
from mergejax.core import errors
from mergejax.core import tree


class Split(nn.Module):
  """Kernels [4, 2, 3], [2, 3, 4] and, scanned, [layers, 4, 2, 2]."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        y = nn.DenseGeneral((2, 2), name='wide')(x)
        return x + nn.tanh(y).reshape(x.shape), None

    x = nn.tanh(nn.DenseGeneral((2, 3), name='split')(x))
    x = nn.DenseGeneral(4, axis=(-2, -1), name='join')(x)
    layers = nn.scan(
      Layer, variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True}, length=2,
    )  # fmt: skip
    return layers(name='layers')(x, None)[0]


AXES = [
  ('split/kernel', ('inputs', 'outputs', 'outputs')),
  ('join/kernel', ('inputs', 'inputs', 'outputs')),
  ('layers/wide/kernel', ('layers', 'inputs', 'outputs', 'outputs')),
  ('split/bias', ('outputs', 'outputs')),
  ('layers/wide/bias', ('layers', 'outputs', 'outputs')),
]


class LayoutsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.module = Split()
    rng = np.random.default_rng(0)
    xs = rng.normal(size=(2, 60, 4)).astype(np.float32)
    self.params = [
      jax.jit(self.module.init)(jax.random.key(k), xs[k])['params']
      for k in range(2)
    ]
    apply = lambda module, params, batch: module.apply(
      {'params': params}, batch['x'], mutable=['intermediates']
    )[1]
    self.grams = [
      statistics.collect(
        statistics.gram(apply=apply), self.module, params, [{'x': x}]
      )
      for params, x in zip(self.params, xs)
    ]

  def test_regmean_solves_each_kernel(self):
    merged = tree.flatten(
      mj.merge(
        self.params, 'regmean', stats=self.grams, alpha=1.0, ridge=1e-3,
        axes=AXES,
      )
    )  # fmt: skip
    flat = [tree.flatten(params) for params in self.params]
    for path in self.grams[0]:
      grams = [np.float64(gram[path]['gram']) for gram in self.grams]
      size = grams[0].shape[-1]
      grams = [
        g + 1e-3 * np.eye(size) * np.trace(g, 0, -2, -1)[..., None, None] / size
        for g in grams
      ]
      kernels = [
        np.float64(one[path]).reshape(*grams[0].shape[:-1], -1) for one in flat
      ]
      solved = np.linalg.solve(
        sum(grams), sum(g @ w for g, w in zip(grams, kernels))
      )
      np.testing.assert_allclose(
        merged[path].reshape(solved.shape), solved, rtol=1e-3, atol=1e-4,
        err_msg=path,
      )  # fmt: skip
    for path in ('split/bias', 'layers/wide/bias'):
      mean = sum(np.float64(one[path]) for one in flat) / 2
      np.testing.assert_allclose(merged[path], mean, rtol=1e-5, atol=1e-6)

  def test_the_message_says_how_to_name_them(self):
    with self.assertRaises(errors.UserError) as raised:
      mj.merge(self.params, 'regmean', stats=self.grams, axes=AXES[1:])
    for words in (
      "('split/kernel', (",
      "call each axis of its inputs 'inputs', each of its outputs 'outputs'",
    ):
      self.assertIn(words, raised.exception.message)


if __name__ == '__main__':
  absltest.main()
