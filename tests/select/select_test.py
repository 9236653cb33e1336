# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of models for tasks: goldens, densities, laws."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import select
from mergejax.core import errors
from mergejax.core import labels as labels_lib
from mergejax.select import b_tuning
from mergejax.select import bayes
from mergejax.select import features as features_lib
from mergejax.training import objective

CASES = ('cls_tall', 'cls_wide', 'reg_tall', 'cls_relu')


def density(features, labels, found):
  """Mean over columns of `ln N(y; 0, I / beta + F F^T / alpha) / N`."""
  features = np.asarray(features, np.float64)
  targets = labels if labels.ndim == 2 else np.eye(labels.max() + 1)[labels]
  count = len(features)
  total = 0.0
  for y, alpha, beta in zip(targets.T, found.alphas, found.betas):
    covariance = np.eye(count) / beta + features @ features.T / alpha
    _, log_det = np.linalg.slogdet(covariance)
    total += -0.5 * (
      log_det + y @ np.linalg.solve(covariance, y) + count * np.log(2 * np.pi)
    )
  return total / count / targets.shape[1]


class LogmeTest(parameterized.TestCase):
  def case(self, name):
    arrays = goldens.load('logme')
    return arrays, arrays[f'{name}_f'], arrays[f'{name}_y']

  @parameterized.parameters(*CASES)
  def test_golden(self, name):
    arrays, features, labels = self.case(name)
    compat = bayes.evidence(features, labels, reference_compat=True)
    get = lambda what: arrays[f'{name}_jmlr_{what}']
    np.testing.assert_allclose(compat.score, get('score'), rtol=1e-9)
    exact = bayes.evidence(features, labels)
    np.testing.assert_allclose(
      exact.score, get('score_rank_corrected'), rtol=1e-9
    )
    np.testing.assert_allclose(exact.alphas, get('alphas'), rtol=1e-7)
    np.testing.assert_allclose(exact.betas, get('betas'), rtol=1e-7)
    np.testing.assert_allclose(exact.means, get('ms'), rtol=1e-6, atol=1e-9)
    said = exact.predict(features)
    expected = arrays[f'{name}_predict']
    if labels.ndim == 1:
      np.testing.assert_array_equal(said.argmax(axis=1), expected)
    else:
      np.testing.assert_allclose(said, expected, rtol=1e-6, atol=1e-9)

  @parameterized.parameters(*CASES)
  def test_golden_icml(self, name):
    arrays, features, labels = self.case(name)
    found = bayes.evidence(features, labels, variant='icml')
    get = lambda what: arrays[f'{name}_icml_{what}']
    np.testing.assert_allclose(found.score, get('score'), rtol=1e-7)
    np.testing.assert_allclose(found.alphas, get('alphas'), rtol=1e-6)
    np.testing.assert_allclose(found.means, get('ms'), rtol=1e-5, atol=1e-8)

  @parameterized.parameters(*CASES, 'deficient')
  def test_exact_is_the_log_density(self, name):
    if name == 'deficient':
      rng = np.random.default_rng(0)
      features = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 9))
      labels = rng.integers(0, 3, 50)
    else:
      _, features, labels = self.case(name)
    found = bayes.evidence(features, labels)
    self.assertAlmostEqual(
      found.score, density(features, labels, found), delta=5e-3
    )

  def test_laws(self):
    _, features, labels = self.case('cls_tall')
    score = select.logme(features, labels)
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    order = rng.permutation(60)
    padded = np.concatenate([features, np.zeros((60, 30))], axis=1)
    for other, own in (
      (features @ rotation, labels),
      (features[order], labels[order]),
      (padded, labels),
      (features.astype(np.float32), labels),
    ):
      self.assertAlmostEqual(select.logme(other, own), score, places=5)
    wide = np.concatenate([features[:, :3], np.zeros((60, 70))], axis=1)
    released = select.logme(wide, labels, reference_compat=True)
    self.assertNotAlmostEqual(released, select.logme(wide, labels), places=2)
    noise = rng.normal(size=features.shape)
    informative = np.eye(4)[labels] @ rng.normal(size=(4, 12)) + 0.3 * noise
    self.assertGreater(
      select.logme(informative, labels), select.logme(noise, labels)
    )

  @parameterized.parameters(*CASES)
  def test_moments(self, name):
    _, features, labels = self.case(name)
    targets = labels if labels.ndim == 2 else np.eye(labels.max() + 1)[labels]
    streamed = bayes.from_moments(
      features.T @ features, features.T @ targets, (targets**2).sum(axis=0),
      len(features),
    )  # fmt: skip
    whole = bayes.evidence(features, labels)
    self.assertAlmostEqual(streamed.score, whole.score, delta=2e-6)
    np.testing.assert_allclose(streamed.means, whole.means, atol=1e-5)

  def test_empty_class(self):
    _, features, labels = self.case('cls_tall')
    shifted = np.where(labels == 1, 4, labels)
    with self.assertLogs(level='WARNING'):
      counted = bayes.evidence(features, shifted)
    with self.assertLogs(level='WARNING'):
      skipped = bayes.evidence(features, shifted, skip_empty=True)
    self.assertLen(counted.alphas, len(skipped.alphas) + 1)

  def test_bad_input(self):
    good = np.ones((4, 2))
    for message, features, labels in (
      ('numbered from 0', good, np.array([-1, 0, 1, 0])),
      ('3 labels for 4', good, np.array([0, 1, 0])),
      ('not finite', good * np.nan, np.array([0, 1, 0, 1])),
      ('two samples', good[:1], np.array([0])),
      ('whole numbers', good, np.array([0.5, 1, 0, 1])),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        select.logme(features, labels)
    with self.assertRaisesRegex(errors.UserError, 'outside the range'):
      labels_lib.check_classes(np.array([0, 7]), 3)


class TransferTest(absltest.TestCase):
  def test_golden(self):
    arrays = goldens.load('leep_nce')
    labels = arrays['target_label']
    np.testing.assert_allclose(
      select.leep(arrays['source_probs'], labels), arrays['leep'], rtol=1e-9
    )
    for name in ('', '_gap'):
      np.testing.assert_allclose(
        select.nce(arrays[f'source_label{name}'], labels),
        arrays[f'nce{name}'], rtol=1e-9,
      )  # fmt: skip

  def test_a_source_class_without_mass(self):
    probabilities = np.array([[0.5, 0.5, 0], [0.2, 0.8, 0]])
    self.assertTrue(np.isfinite(select.leep(probabilities, [0, 1])))

  def test_bad_input(self):
    with self.assertRaisesRegex(errors.UserError, 'softmax'):
      select.leep(np.array([[2.0, -1.0]]), [0])
    with self.assertRaisesRegex(errors.UserError, 'one row'):
      select.leep(np.ones((2, 1)), [0])
    with self.assertRaisesRegex(errors.UserError, 'one for each'):
      select.nce([0, 1], [0])

  def test_h_score(self):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    features = rng.normal(size=(60, 4)) + np.eye(3, 4)[labels] * 2
    # By the eigenvalues of the between-class covariance in whitened space.
    covariance = np.cov(features.T, bias=True)
    centred = features - features.mean(axis=0)
    means = np.stack([centred[labels == c].mean(axis=0) for c in range(3)])
    share = np.bincount(labels) / 60
    between = (means * share[:, None]).T @ means
    expected = np.trace(np.linalg.solve(covariance, between))
    self.assertAlmostEqual(select.h_score(features, labels), expected)
    self.assertAlmostEqual(
      select.h_score(features @ rng.normal(size=(4, 4)), labels), expected
    )
    with self.assertRaisesRegex(errors.UserError, 'shrinkage'):
      select.h_score(features, labels, shrinkage=2)


class BTuningTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    x64 = jax.enable_x64(True)
    x64.__enter__()
    self.addCleanup(x64.__exit__, None, None, None)
    self.arrays = {
      n: jnp.asarray(x) for n, x in goldens.load('b_tuning').items()
    }

  def total(self, student, logits, teacher0=None, means=None):
    arrays = self.arrays
    labels = arrays['labels']
    log_p = jax.nn.log_softmax(logits)
    cross = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))
    extra = b_tuning.loss(
      student,
      arrays['student_m'] if means is None else means,
      [arrays['teacher0_features'] if teacher0 is None else teacher0,
       arrays['teacher1_features']],
      [arrays['teacher0_m'], arrays['teacher1_m']],
      b_tuning.teacher_weights(arrays['teacher_logme']),
    )  # fmt: skip
    return cross + 100 * extra, extra

  def test_golden(self):
    arrays = self.arrays
    np.testing.assert_allclose(
      b_tuning.teacher_weights(arrays['teacher_logme']), arrays['pi'], rtol=1e-9
    )
    student, logits = arrays['student_features'], arrays['logits']
    (value, extra), gradients = jax.value_and_grad(
      self.total, argnums=(0, 1), has_aux=True
    )(student, logits)
    np.testing.assert_allclose(value, arrays['total_loss'], rtol=1e-9)
    np.testing.assert_allclose(extra, arrays['mse_loss'], rtol=1e-9)
    for found, name in zip(gradients, ('student_features', 'logits')):
      np.testing.assert_allclose(found, arrays[f'grad_{name}'], rtol=1e-7)

  def test_no_gradient_reaches_teachers_or_means(self):
    arrays = self.arrays
    gradients, _ = jax.grad(self.total, argnums=(2, 3), has_aux=True)(
      arrays['student_features'], arrays['logits'],
      arrays['teacher0_features'], arrays['student_m'],
    )  # fmt: skip
    for gradient in gradients:
      np.testing.assert_array_equal(gradient, np.zeros_like(gradient))

  def test_weights_follow_the_temperature(self):
    sharp = b_tuning.teacher_weights([1.0, 0.9], 0.01)
    soft = b_tuning.teacher_weights([1.0, 0.9], 10.0)
    self.assertGreater(sharp[0], 0.99)
    self.assertLess(soft[0], 0.51)
    with self.assertRaisesRegex(
      errors.UserError, 'posterior means of teacher 0'
    ):
      b_tuning.loss(jnp.ones((2, 3)), jnp.ones((2, 3)), [jnp.ones((2, 4))],
                    [None], jnp.ones(1))  # fmt: skip


class FeaturesTest(parameterized.TestCase):
  def test_language_models_skip_padding(self):
    module = models.build(
      dict(model_type='lm', vocab_size=9, emb_dim=6, num_heads=1, head_dim=4,
           mlp_dim=8, num_layers=1)
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    targets = np.array([[3, 4, 5, 1], [3, 1, 0, 0], [0, 0, 0, 0]])
    batch = {
      'decoder_target_tokens': targets,
      'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    found = select.extract(module, params, [batch])
    self.assertEqual(found.shape, (2, 6))
    short = {n: x[1:2, :2] for n, x in batch.items()}
    np.testing.assert_allclose(
      found[1:], select.extract(module, params, [short]), rtol=1e-4, atol=1e-6
    )

  def test_heads_of_image_classifiers(self):
    module = models.build(
      dict(model_type='mlp', hidden=(5,), image_shape=(2, 2, 1))
    )
    params = models.family_of(module).init(jax.random.key(0))
    batch = models.family_of(module).example_batch(3)
    batch['images'] = batch['images'] + 0.5
    found = select.extract(module, params, [batch])
    head = params['head']
    np.testing.assert_allclose(
      found @ head['kernel'] + head['bias'][None],
      models.family_of(module).logits(params, batch), rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    with self.assertRaisesRegex(errors.UserError, 'head/kernel'):
      select.extract(module, params, [batch], layer='hed/kernel')

  def test_trainer_hook(self):
    module = models.build(
      dict(model_type='mlp', hidden=(5,), image_shape=(2, 2, 1))
    )
    params = models.family_of(module).init(jax.random.key(0))
    batch = models.family_of(module).example_batch(4)
    batch['images'] = jax.random.uniform(jax.random.key(1), (4, 2, 2, 1))
    features = lambda p, batch: features_lib.features_of(
      module, p, batch, 'head/kernel'
    )
    teacher = jnp.ones((4, 3)), jnp.ones((10, 3))
    combined = b_tuning.with_teachers(
      objective.cross_entropy(), features, jnp.ones((10, 5)),
      [(lambda batch: teacher[0], teacher[1])], [0.3], trade_off=2.0,
    )  # fmt: skip
    plain, _ = objective.make_loss(module)(params, batch)
    value, metrics = objective.make_loss(module, combined)(params, batch)
    np.testing.assert_allclose(
      value, plain + 2 * metrics['b_tuning'], rtol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
