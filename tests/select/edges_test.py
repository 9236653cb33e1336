# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Features and targets at the edges: a number that is right, or a refusal."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import select
from mergejax.core import errors
from mergejax.select import b_tuning
from mergejax.select import bayes
from mergejax.select import ranking

LABELS = np.array([0, 0, 1, 2] * 5)


def of_noise(labels):
  """Mean log density of each column under its best normal around 0."""
  columns = np.eye(labels.max() + 1)[labels].T
  variance = (columns**2).mean(axis=1)
  return float(np.mean(-0.5 * (np.log(2 * np.pi * variance) + 1)))


class LogmeTest(parameterized.TestCase):
  @parameterized.parameters('jmlr', 'icml')
  def test_features_that_say_nothing(self, variant):
    for features in (np.zeros((20, 3)), np.zeros((20, 40))):
      found = bayes.evidence(features, LABELS, variant=variant)
      self.assertAlmostEqual(found.score, of_noise(LABELS), places=4)
      np.testing.assert_array_equal(
        found.means, np.zeros((3, features[0].size))
      )
      np.testing.assert_array_equal(found.predict(features), np.zeros((20, 3)))
    streamed = bayes.from_moments(
      np.zeros((3, 3)), np.zeros((3, 3)), np.bincount(LABELS), 20
    )
    self.assertAlmostEqual(streamed.score, of_noise(LABELS), places=4)

  def test_a_dead_model_is_ranked(self):
    module = models.build(
      dict(model_type='mlp', hidden=(4,), classes=3, image_shape=(2, 2, 1),
           norm='none')
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    dead = {**params, 'dense_0': jax.tree.map(
      lambda leaf: leaf * 0 - 100, params['dense_0']
    )}  # fmt: skip
    images = np.random.default_rng(0).random((20, 2, 2, 1), np.float32)
    tasks = {'t': [{'images': images, 'labels': LABELS}]}
    scores = ranking.rank([('dead', module, dead)], tasks)
    self.assertAlmostEqual(scores['dead']['t'], of_noise(LABELS), places=4)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    for score in ranking.SCORES:
      with self.assertRaisesRegex(errors.UserError, 'broken, t: .*not finite'):
        ranking.rank([('broken', module, broken)], tasks, score=score)

  @parameterized.parameters(6, 60)
  def test_the_scale_of_features_does_not_matter(self, width):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, width)) + LABELS[:, None]
    score = select.logme(features, LABELS)
    for scale in (1e-180, 1e-6, 30.0, 1e4, 1e180):
      self.assertAlmostEqual(select.logme(scale * features, LABELS), score)

  def test_the_score_is_the_largest_evidence(self):
    rng = np.random.default_rng(0)
    labels = LABELS % 2
    features = 1e4 * (rng.normal(size=(20, 2)) + labels[:, None])
    best = 0.0
    for y in np.eye(2)[labels].T:
      spans = np.exp(np.linspace(-6, 6, 61))
      best += max(
        -0.5 * (
          np.linalg.slogdet(
            v * (np.eye(20) + r * features @ features.T / 1e8)
          )[1]
          + y @ np.linalg.solve(
            v * (np.eye(20) + r * features @ features.T / 1e8), y
          )
          + 20 * np.log(2 * np.pi)
        )
        for v in spans for r in spans
      ) / 40  # fmt: skip
    self.assertAlmostEqual(select.logme(features, labels), best, delta=5e-3)

  @parameterized.parameters(
    ('targets are not finite', np.ones((4, 2)), np.full((4, 1), np.nan)),
    ('targets are not finite', np.ones((4, 2)), np.full((4, 1), np.inf)),
    ('must be numbers', np.ones((4, 2)), np.full((4, 1), 'a')),
    ('1 labels for 4', np.ones((4, 2)), np.array(3)),
    ('width', np.ones((4, 0)), np.array([0, 1, 0, 1])),
    ('features are not finite', np.full((4, 2), np.inf), np.array([0, 1, 0, 1])),
  )  # fmt: skip
  def test_refused(self, message, features, labels):
    with self.assertRaisesRegex(errors.UserError, message):
      select.logme(features, labels)
    with self.assertRaisesRegex(errors.UserError, message):
      bayes.evidence(features, labels)

  def test_numbers_too_large_to_be_squared(self):
    for variant in ('jmlr', 'icml'):
      with np.errstate(over='ignore'):
        with self.assertRaisesRegex(errors.UserError, 'too large'):
          bayes.evidence(np.full((20, 3), 1e200), LABELS, variant=variant)


class OthersTest(absltest.TestCase):
  def test_leep_and_h_score(self):
    given = np.array([[0.5, 0.5], [np.nan, np.nan]])
    with self.assertRaisesRegex(errors.UserError, 'not finite'):
      select.leep(given, [0, 1])
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 3)) + LABELS[:, None]
    score = select.h_score(features, LABELS)
    for scale in (1e-200, 1e200):
      self.assertAlmostEqual(select.h_score(scale * features, LABELS), score)
    self.assertEqual(select.h_score(0 * features, LABELS), 0)
    with self.assertRaisesRegex(errors.UserError, 'one row'):
      select.h_score(np.ones((20, 0)), LABELS)

  def test_b_tuning(self):
    with self.assertRaisesRegex(errors.UserError, 'score of teacher 1'):
      b_tuning.teacher_weights([0.5, float('nan')])
    one = (jnp.ones((2, 3)), jnp.ones((4, 3)))
    for features, weights, message in (
      (jnp.ones((2, 3)), jnp.ones(2), '2 weights'),
      (jnp.ones((1, 3)), jnp.ones(1), 'one batch'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        b_tuning.loss(*one, [features], [jnp.ones((4, 3))], weights)
    with self.assertRaisesRegex(errors.UserError, 'means of teacher 0'):
      b_tuning.with_teachers(
        None, None, one[1], [(None, np.full((4, 3), np.nan))], [0.5]
      )

  def test_b_tuning_without_rows_that_fill_a_batch(self):
    """What a model makes of them may be anything, even undefined."""
    rng = np.random.default_rng(0)
    own, means = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    other, others = rng.normal(size=(5, 2)), rng.normal(size=(4, 2))
    expected = np.mean(np.square(own @ means.T - other @ others.T)[:3])
    own[3:], other[4] = np.nan, np.inf
    batch = {
      'images': jnp.asarray(own, jnp.float32), 'labels': np.zeros(5, int),
      'weights': np.array([1.0, 0.5, 2.0, 0.0, 0.0], np.float32),
    }  # fmt: skip
    combined = b_tuning.with_teachers(
      lambda family, params, batch, rngs: (
        jnp.zeros(()), models.Outputs(None, None, batch['weights'])
      ),
      lambda params, batch: batch['images'] * params,
      jnp.asarray(means, jnp.float32),
      [(lambda batch: jnp.asarray(other, jnp.float32),
        jnp.asarray(others, jnp.float32))],
      [0.5], trade_off=1.0,
    )  # fmt: skip
    found, outputs = combined(None, jnp.ones(()), batch, None)
    self.assertAlmostEqual(float(found), expected, places=4)
    self.assertAlmostEqual(
      float(outputs.metrics['b_tuning']), expected, places=4
    )


if __name__ == '__main__':
  absltest.main()
