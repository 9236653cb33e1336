# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gates of skills: noise, dropout, and who draws what."""

from absl.testing import absltest
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.core import tree

ROWS, TOKENS = 40, 3


class Linear(nn.Module):
  """Two linear maps, one behind the other, of all numbers alike."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, name='second')(nn.Dense(4, name='first')(x))


def adapted(**settings):
  """`(family, params, batch)`: rows of one task and of equal tokens."""
  batch = {
    'inputs': np.ones((ROWS, TOKENS, 4), np.float32),
    'labels': np.zeros(ROWS, np.int32),
    'task_ids': np.zeros(ROWS, np.int32),
  }
  plain = models.Classifier(Linear(), example=batch)
  poly = mj.adapters.poly(
    tasks=1, skills=3, targets='(first|second)/kernel', **settings
  )
  family = mj.adapters.adapt(plain, poly)
  rng = np.random.default_rng(0)
  draw = lambda spec: rng.normal(size=spec.shape).astype(np.float32)
  leaves = {p: draw(spec) for p, spec in family.specs().items()}
  return family, tree.unflatten(leaves), batch


def run(family, params, batch, seed, train=True):
  return family.call(
    family.variables(params), batch, train=train,
    rngs={'dropout': jax.random.key(seed)},
  )[0]  # fmt: skip


class NoiseTest(absltest.TestCase):
  def test_the_mean_is_that_of_the_distribution(self):
    z = np.float32([-2.0, 0.0, 1.5])
    logits = jnp.tile(z, (20000, 1, 1))
    draw = lambda seed: mj.adapters.gates(
      logits, 'average', key=jax.random.key(seed)
    )
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertFalse(np.array_equal(draw(0), draw(1)))
    # E sigmoid(z + log u - log(1 - u)), u uniform, by the midpoint rule.
    u = (np.arange(100_000) + 0.5)[:, None] / 100_000
    expected = 1 / (1 + np.exp(-z) * (1 - u) / u)
    found = draw(0) * np.sqrt(3)
    np.testing.assert_allclose(
      jnp.mean(found, axis=(0, 1)), expected.mean(0), atol=0.01
    )
    np.testing.assert_allclose(
      jnp.std(found, axis=(0, 1)), expected.std(0), atol=0.01
    )
    # More likely skills are drawn more.
    self.assertTrue(np.all(np.diff(jnp.mean(found, axis=(0, 1))) > 0.1))

  def test_every_row_draws_and_every_layer(self):
    for settings in (dict(noise=True), dict(gate_dropout=0.5)):
      family, params, batch = adapted(**settings)
      self.assertEqual(family.rng_streams(train=True), ('dropout',))
      self.assertEqual(family.rng_streams(train=False), ())
      one = np.asarray(run(family, params, batch, 0))
      np.testing.assert_array_equal(one, run(family, params, batch, 0))
      self.assertFalse(np.array_equal(one, run(family, params, batch, 1)))
      for seed in (0, 1):
        still = run(family, params, batch, seed, train=False)
        np.testing.assert_array_equal(still, family.logits(params, batch))
      # Tokens of a row have its gates; rows have their own.
      np.testing.assert_array_equal(one, np.repeat(one[:, :1], TOKENS, axis=1))
      self.assertGreater(len(np.unique(one[:, 0], axis=0)), 10)

  def test_layers_draw_apart(self):
    # In half of the rows all gates are 0, in one layer others than in the other.
    family, params, batch = adapted(gate_dropout=0.8)
    off = []
    for other in ('first', 'second'):
      changed = {
        **params,
        other: {**params[other], 'poly_b': 0 * params[other]['poly_b']},
      }
      found = run(family, changed, batch, 0)
      plain = family.plain.logits(family.split(params)[0], batch)
      off.append(np.all(np.isclose(found, plain, atol=1e-5), axis=(1, 2)))
    for rows in off:  # 0.8 ** 3 of them, 20 of 40
      self.assertBetween(rows.sum(), 8, 33)
    self.assertFalse(np.array_equal(*off))


class DropoutTest(absltest.TestCase):
  def test_by_hand(self):
    z = np.random.default_rng(0).normal(size=(4000, 2, 3)).astype(np.float32)
    gates = lambda **settings: np.asarray(
      mj.adapters.gates(
        z, dropout=0.25, dropout_key=jax.random.key(0), **settings
      )
    )
    plain = 1 / (1 + np.exp(-np.float64(z)))
    scaled = gates(selector='average') / np.sqrt(2 / 3)
    kept = scaled != 0
    self.assertBetween(kept.mean(), 0.74, 0.76)
    np.testing.assert_allclose(scaled, kept * plain / 0.75, rtol=1e-5)
    sums = (kept * plain).sum(-1, keepdims=True)
    self.assertIn(0, sums)
    np.testing.assert_allclose(
      gates(), kept * plain / np.where(sums, sums, 1), rtol=1e-5
    )
    shared = gates(shared_skill=True)
    wide = kept * plain / 0.75
    wide[..., -1] = 1
    np.testing.assert_allclose(
      shared, wide / wide.sum(-1, keepdims=True), rtol=1e-5
    )


class RoundedTest(absltest.TestCase):
  def test_all_gates_rounded_to_zero_turn_it_off(self):
    family, params, batch = adapted(selector='straight_through')
    for name in ('first', 'second'):
      params[name]['poly_logits'] = -np.ones((1, 3), np.float32)
    base, _ = family.split(params)
    np.testing.assert_array_equal(
      family.logits(params, batch), family.plain.logits(base, batch)
    )
    z = jnp.float32([[1.0, 2.0, -1.0]])
    grad = jax.grad(
      lambda z: jnp.sum(mj.adapters.gates(z, 'straight_through')[..., 0])
    )(z)
    # Of `g_0 / sum g` with g rounded, and the sigmoid's slope: (1, 1, 0).
    slope = 1 / (1 + np.exp(-np.float64(z))) / (1 + np.exp(np.float64(z)))
    np.testing.assert_allclose(
      grad, slope * (np.eye(3)[:1] / 2 - 1 / 4), rtol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
