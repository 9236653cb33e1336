# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Git Re-Basin against the released code: matching, curves, three models."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax import align
from mergejax.align import activations
from mergejax.align import pairs as pairs_lib
from mergejax.align import straight_through
from mergejax.align import weights
from mergejax.core import errors
from mergejax.core import tree
from mergejax.intercept import capture


class GoldenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.arrays = goldens.load('git_rebasin')
    self.model = lambda prefix: tree.unflatten(
      {
        p.replace('__', '/'): x
        for p, x in goldens.subtree(self.arrays, f'{prefix}__').items()
      }
    )
    self.a, self.b = self.model('a'), self.model('b')
    names = {}
    for i in range(4):
      before = None if i == 0 else f'P_{i - 1}'
      after = None if i == 3 else f'P_{i}'
      names[f'Dense_{i}/kernel'] = (before, after)
      names[f'Dense_{i}/bias'] = (after,)
    self.spec = align.permutation_spec(names, self.a)
    self.permutation = {
      f'P_{i}': self.arrays[f'wm_perm__P_{i}'] for i in range(3)
    }

  def logits(self, params, x):
    for i in range(4):
      layer = params[f'Dense_{i}']
      x = x @ layer['kernel'] + layer['bias'][None]
      x = jnp.maximum(x, 0.0) if i < 3 else x
    return x

  def loss(self, params, batch):
    x, y = batch
    log_p = jax.nn.log_softmax(self.logits(params, x))
    return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

  def curve(self, second):
    batch = self.arrays['x'], self.arrays['y']
    return [
      float(self.loss(jax.tree.map(
          lambda x, y, by=np.float32(by): (1 - by) * x + by * y,
          self.a, second), batch))
      for by in self.arrays['lambdas']
    ]  # fmt: skip

  def test_derived_groups_are_those_of_the_specification(self):
    derived = align.derive(self.logits, self.a, self.arrays['x'])
    by_leaves = lambda spec: sorted(spec.leaves_with(n) for n in spec.groups)
    self.assertEqual(by_leaves(derived), by_leaves(self.spec))

  def test_permuting_and_interpolating(self):
    moved = align.permute(self.spec, self.permutation, self.b)
    np.testing.assert_allclose(
      self.logits(moved, self.arrays['x'][:5]),
      self.arrays['logits_b_first5'], rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
      self.curve(self.b), self.arrays['loss_curve_naive'], rtol=1e-4
    )
    np.testing.assert_allclose(
      self.curve(moved), self.arrays['loss_curve_matched'], rtol=1e-4
    )
    for name, permutation in (
      ('wm_objective_identity', None), ('wm_objective_matched', self.permutation)
    ):  # fmt: skip
      self.assertAlmostEqual(
        align.objective(self.spec, self.a, self.b, permutation),
        float(self.arrays[name]), places=3,
      )  # fmt: skip

  def test_weight_matching_is_in_the_band(self):
    band = self.arrays['wm_objective_20_orders']
    found = [
      align.objective(
        self.spec, self.a, self.b,
        align.match_weights(self.spec, self.a, self.b, key),
      )
      for key in range(10)
    ]  # fmt: skip
    self.assertGreaterEqual(min(found), 0.98 * band.min())
    self.assertGreaterEqual(np.mean(found), 0.995 * band.mean())
    identity = float(self.arrays['wm_objective_identity'])
    self.assertGreater(min(found), identity)
    best = align.match_weights(self.spec, self.a, self.b, jax.random.key(3))
    matched = self.curve(align.permute(self.spec, best, self.b))
    naive = self.curve(self.b)
    self.assertLess(matched[5], naive[5])
    self.assertAlmostEqual(matched[-1], naive[-1], places=5)

  def test_planted(self):
    planted = self.model('planted_b')
    found = align.match_weights(self.spec, self.a, planted)
    for i in range(3):
      np.testing.assert_array_equal(
        found[f'P_{i}'], self.arrays[f'planted_perm__P_{i}']
      )

  def test_one_assignment(self):
    pairs = pairs_lib.Pairs(self.spec, self.a, self.b)
    unit = pairs_lib.units(self.spec)['P_0']
    start = align.identity(self.spec)
    found = pairs.similarities(unit, start)
    np.testing.assert_allclose(
      np.asarray(found[None])[0, :, 0, :, 0],
      self.arrays['similarity_P_0_identity_elsewhere'],
      rtol=1e-4,
      atol=1e-5,
    )
    new, gain = weights.assign(self.spec, unit, found, start)
    np.testing.assert_array_equal(
      new['P_0'], self.arrays['lap_P_0_identity_elsewhere']
    )
    self.assertGreater(gain, 0)

  @parameterized.parameters('inner', 'pearson')
  def test_activation_matching(self, similarity):
    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        for i, width in enumerate((20, 16, 20, 4)):
          x = nn.Dense(width)(x)
          x = nn.relu(x) if i < 3 else x
        return x

    apply = lambda module, params, batch: module.apply(
      {'params': params}, batch['x'], mutable=[capture.COLLECTION]
    )[1]
    x = self.arrays['x']
    for batches in ([{'x': x}], [{'x': x[:100]}, {'x': x[100:]}]):
      found = activations.match_activations(
          self.spec, Net(), self.a, self.b, batches, similarity=similarity,
          apply=apply,
      )  # fmt: skip
      kind = 'rawinner' if similarity == 'inner' else 'pearson'
      for i in range(3):
        np.testing.assert_array_equal(
          found[f'P_{i}'], self.arrays[f'act_perm_{kind}__P_{i}']
        )

  def test_activation_statistics(self):
    hidden = {}
    for name, params in (('a', self.a), ('b', self.b)):
      first = params['Dense_0']
      hidden[name] = jnp.maximum(
        self.arrays['x'] @ first['kernel'] + first['bias'][None], 0.0
      )
    ones = jnp.ones(300)
    sums = activations._moments((hidden['a'], ones), (hidden['b'], ones))
    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
    pearson = activations._similarity(sums, 'pearson')[0]
    np.testing.assert_allclose(
      pearson, self.arrays['act_pearson__0'], rtol=2e-3, atol=2e-4
    )
    # cov / (n - 1) + outer(means), the released script's statistic
    inner = activations._similarity(sums, 'inner')[0]
    outer = np.outer(sums['a'], sums['b']) / 300**2
    np.testing.assert_allclose(
      (inner - outer) * 300 / 299 + outer, self.arrays['act_Eab__0'],
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip

  def test_straight_through(self):
    batch = self.arrays['x'], self.arrays['y']
    projected = align.permute(self.spec, self.permutation, self.b)
    value, gradient = jax.value_and_grad(
      straight_through.midpoint_loss, argnums=1
    )(self.loss, self.a, self.a, projected, batch)
    np.testing.assert_allclose(value, self.arrays['ste_loss'], rtol=1e-5)
    expected = self.model('ste_grad')
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
      gradient,
      expected,
    )
    copy = jax.tree.map(np.copy, self.b)
    found = align.match_straight_through(
      self.spec, self.loss, self.a, self.b, [batch] * 45, batch,
      validate_every=1,
    )  # fmt: skip
    self.assertLess(found.loss, found.losses[0])
    self.assertAlmostEqual(found.loss, min(found.losses), places=5)
    # The permutation that is returned is the best one, not the last.
    best = align.permute(self.spec, found.permutation, self.b)
    self.assertAlmostEqual(self.curve(best)[5], found.loss, places=4)
    jax.tree.map(np.testing.assert_array_equal, self.b, copy)

  def test_many(self):
    several = [self.a, self.b, self.model('c')]
    batch = self.arrays['x'], self.arrays['y']

    def apart(some):
      flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in some]  # fmt: skip
      return sum(
        np.square(flat[i] - flat[j]).sum() for i in range(3) for j in range(i)
      )

    mean = lambda some: mj.merge(some, 'linear')
    self.assertAlmostEqual(
      apart(several) / float(self.arrays['mergemany_pairwise_sq_l2_before']),
      1, places=4,
    )  # fmt: skip
    self.assertAlmostEqual(
      float(self.loss(mean(several), batch)),
      float(self.arrays['mergemany_naive_loss']), places=4,
    )  # fmt: skip
    done = min(
      (align.merge_many(self.spec, several, key) for key in range(3)), key=apart
    )
    expected = float(self.arrays['mergemany_pairwise_sq_l2_after'])
    self.assertLess(apart(done), 1.03 * expected)
    self.assertLess(
      float(self.loss(mean(done), batch)),
      float(self.arrays['mergemany_naive_loss']),
    )
    with self.assertRaisesRegex(errors.UserError, 'at least two'):
      align.merge_many(self.spec, several[:1])


if __name__ == '__main__':
  absltest.main()
