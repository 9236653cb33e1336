# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation: its loss by NumPy, its gradient, its place in a trainer."""

import pathlib
import sys

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mergejax as mj
from mergejax import models
from mergejax import training
from mergejax.core import errors
from mergejax.core import tree
from mergejax.experts import branch
from mergejax.training import distillation
from mergejax.training import objective

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_runs  # noqa: E402

SIZES = dict(vocab_size=12, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)


def lm():
  return models.family_of(
    models.build(dict(model_type='lm', num_layers=1, **SIZES))
  )


def batch():
  targets = np.random.default_rng(0).integers(2, 12, (3, 5)).astype(np.int32)
  targets[1, 3:] = 0
  return {
    'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    'decoder_target_tokens': targets,
  }


def log_softmax(x):
  x = np.asarray(x, np.float64)
  return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


class LossTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.family = lm()
    init = jax.jit(cls.family.init)
    cls.student, cls.teacher = [init(jax.random.key(i)) for i in (0, 1)]
    cls.logits = staticmethod(jax.jit(cls.family.logits))

  def loss(self, teacher, **settings):
    made = distillation.distillation((self.family, teacher), **settings)
    return jax.jit(
      jax.value_and_grad(objective.make_loss(self.family, made), has_aux=True)
    )(self.student, batch())

  def test_is_the_formula(self):
    """Labels, the teacher's probabilities at T, smoothing and the z-loss."""
    share, t, smoothing, z_loss = 0.25, 2.0, 0.1, 0.01
    (found, metrics), _ = self.loss(
      self.teacher, share=share, temperature=t, label_smoothing=smoothing,
      z_loss=z_loss,
    )  # fmt: skip
    ours, theirs = [
      np.asarray(self.logits(p, batch())) for p in (self.student, self.teacher)
    ]
    total, divergence, count = 0.0, 0.0, 0
    for row, column in np.argwhere(batch()['decoder_target_tokens'] > 0):
      p, target = (
        ours[row, column],
        batch()['decoder_target_tokens'][row, column],
      )
      wanted = np.full(12, smoothing / 11)
      wanted[target] = 1 - smoothing
      hard = -np.sum(wanted * (log_softmax(p) - np.log(wanted)))
      log_q, soft_p = log_softmax(theirs[row, column] / t), log_softmax(p / t)
      soft = -np.sum(np.exp(log_q) * soft_p)
      log_z = p.astype(np.float64)[0] - log_softmax(p)[0]
      total += (1 - share) * hard + share * t**2 * soft + z_loss * log_z**2
      divergence += np.sum(np.exp(log_q) * (log_q - soft_p))
      count += 1
    self.assertEqual(count, 13)
    np.testing.assert_allclose(found, total / count, rtol=1e-5)
    np.testing.assert_allclose(
      metrics['teacher_kl'], divergence / count, rtol=1e-4
    )

  def test_who_says_the_same_learns_nothing_of_it(self):
    soft = dict(share=1.0, z_loss=0.0, temperature=3.0)
    (_, metrics), same = self.loss(self.student, **soft)
    _, other = self.loss(self.teacher, **soft)
    norm = lambda grads: float(optax.tree.norm(grads))
    self.assertLess(norm(same), 1e-5 * norm(other))
    self.assertLess(abs(float(metrics['teacher_kl'])), 1e-6)

  def test_without_a_share_it_is_cross_entropy(self):
    (found, metrics), _ = self.loss(self.teacher, share=0.0)
    plain = jax.jit(objective.make_loss(self.family))
    wanted, others = plain(self.student, batch())
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    self.assertEqual(metrics.keys() - others.keys(), {'teacher_kl'})

  def test_mistakes(self):
    teacher = (self.family, self.teacher)
    for message, settings in (
      ('share', dict(share=1.5)), ('temperature', dict(temperature=0.0)),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, message):
        distillation.distillation(teacher, **settings)
    key = jax.random.key(0)
    other = models.family_of(
      models.build(dict(model_type='lm', num_layers=1, **SIZES | {
        'vocab_size': 20}))
    )  # fmt: skip
    made = distillation.distillation((other, jax.jit(other.init)(key)))
    with self.assertRaisesRegex(errors.ConfigError, 'the same vocabulary'):
      jax.eval_shape(
        objective.make_loss(self.family, made), self.student, batch()
      )
    pictures = small_runs.mlp()
    params = models.family_of(pictures).init(key)
    made = distillation.distillation((pictures, params))
    with self.assertRaisesRegex(errors.DataError, "the student's kind"):
      made.check_batch(self.family, batch(), 'the data')

  def test_a_checkpoint_is_a_teacher_and_names_itself(self):
    folder = self.create_tempdir().full_path + '/teacher'
    mj.save_checkpoint(
      folder, self.teacher, config=models.describe(self.family)
    )
    stored = distillation.distillation(folder)
    given = distillation.distillation((self.family, self.teacher))
    self.assertEqual(repr(stored), repr(given))
    self.assertNotEqual(
      repr(given), repr(distillation.distillation((self.family, self.student)))
    )
    self.assertNotIn(' at 0x', repr(given))
    jax.tree.map(np.testing.assert_array_equal, stored.params, self.teacher)


class TrainerTest(absltest.TestCase):
  """The teacher is asked before the step, on the mesh, by parts, by experts."""

  def test_a_trainer_asks_the_teacher(self):
    module = small_runs.mlp()
    family = models.family_of(module)
    teacher = family.init(jax.random.key(7))
    made = distillation.distillation((module, teacher), share=0.5)
    data = small_runs.pictures(8)
    start = family.init(jax.random.key(0))
    loss = objective.make_loss(module, made)
    wanted = float(loss(start, data)[0])
    asked = []
    ready = made.prepared
    hook = lambda mesh, rules, **how: (
      asked.append(how) or ready(mesh, rules, **how)
    )
    object.__setattr__(made, 'prepared', hook)
    seen = []
    log = training.callbacks.on_log(lambda _, m: seen.append(m))
    for settings in ({}, {'accumulate': 2, 'mesh': small_runs.one_device()}):
      trainer = training.Trainer(
        module, optax.sgd(0.1), objective=made, callbacks=[log], **settings
      )
      trainer.fit([data], steps=1, params=start)
      hard = float(seen[-1]['loss'])
      soft = float(seen[-1]['teacher_kl'])
      logits = family.logits(teacher, data)
      entropy = float(
        jnp.mean(distillation.soft_cross_entropy(logits, logits)[1])
      )
      z_loss = float(seen[-1]['z_loss'])
      np.testing.assert_allclose(
        0.5 * hard + 0.5 * (soft + entropy) + z_loss, wanted, rtol=1e-5
      )
    mesh = mj.make_mesh(branch=2, data=4)
    trainer = branch.BranchTrainer(
      module, optax.sgd(0.1), experts=['a', 'b'], objective=made, mesh=mesh,
      callbacks=[log],
    )  # fmt: skip
    stacked = jax.tree.map(lambda x: np.stack([x, x]), data)
    trainer.fit([stacked], steps=1, params=start)
    np.testing.assert_allclose(seen[-1]['teacher_kl'], [soft, soft], rtol=1e-4)
    self.assertEqual(
      asked, [{'stacked': False}, {'stacked': False}, {'stacked': True}]
    )

  def test_a_student_learns_from_a_teacher_alone(self):
    module = small_runs.mlp()
    family = models.family_of(module)
    teacher = family.init(jax.random.key(7))
    made = distillation.distillation((module, teacher), share=1.0, z_loss=0.0)
    seen = []
    trainer = training.Trainer(
      module, optax.sgd(0.5), objective=made,
      callbacks=[training.callbacks.on_log(
        lambda _, m: seen.append(float(m['teacher_kl'])))],
    )  # fmt: skip
    state = trainer.fit(
      training.ArrayStream(small_runs.pictures(64), batch_size=16),
      steps=60,
      log_every=1,
    )
    self.assertLess(seen[-1], 0.3 * seen[0])
    self.assertEqual(
      tree.specs(state.params).keys(), tree.specs(teacher).keys()
    )


if __name__ == '__main__':
  absltest.main()
