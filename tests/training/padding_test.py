# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses at their edges, batches of padding alone, tokens nobody knows."""

import io
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.nn import lm
from mergejax.nn import vision
from mergejax.training import batches
from mergejax.training import callbacks
from mergejax.training import losses
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import run as run_lib
from mergejax.training import step as step_lib

VOCAB = 11


def tiny():
  config = lm.LMConfig(
      vocab_size=VOCAB, emb_dim=8, num_heads=2, head_dim=4, num_layers=1,
      mlp_dim=8,
  )  # fmt: skip
  module = lm.LanguageModel(config)
  return module, models.family_of(module).init(jax.random.key(0))


def run_of(*, steps=1, **settings):
  return run_lib.Run(None, None, steps, **settings)


def batch_of(lengths, width=5):
  rng = np.random.default_rng(0)
  targets = rng.integers(1, VOCAB, (len(lengths), width)).astype(np.int32)
  targets *= np.arange(width) < np.array(lengths)[:, None]
  inputs = np.pad(targets[:, :-1], [(0, 0), (1, 0)])
  return {'decoder_input_tokens': inputs, 'decoder_target_tokens': targets}


class CrossEntropyTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.3, 0.999, 1.0)
  def test_every_share_of_smoothing(self, smoothing):
    rng = np.random.default_rng(1)
    logits, target = rng.normal(size=(4, 5)), np.array([0, 2, 4, 1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.full((4, 5), smoothing / 4)
    wanted[np.arange(4), target] = 1 - smoothing
    entropy = -(wanted * np.log(np.where(wanted > 0, wanted, 1))).sum(-1)
    expected = -(wanted * log_p).sum(-1) - entropy
    loss, _ = losses.token_cross_entropy(
      logits.astype(np.float32), target, label_smoothing=smoothing
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(-0.1, 1.1, float('nan'))
  def test_more_smoothing_than_there_is(self, smoothing):
    with self.assertRaisesRegex(errors.UserError, 'between 0 and 1'):
      losses.token_cross_entropy(
        jnp.zeros((1, 5)), np.array([1]), label_smoothing=smoothing
      )

  def test_smoothing_over_a_vocabulary_of_one(self):
    with self.assertRaisesRegex(errors.UserError, 'no other token'):
      losses.token_cross_entropy(
        jnp.zeros((1, 1)), np.array([0]), label_smoothing=0.1
      )

  @parameterized.parameters(-100, -1, 5, 99)
  def test_a_target_outside_the_vocabulary_has_no_loss(self, target):
    loss, _ = losses.token_cross_entropy(
      jnp.zeros((2, 5)), np.array([target, 4])
    )
    self.assertTrue(np.isnan(loss[0]))
    np.testing.assert_allclose(loss[1], np.log(5), rtol=1e-6)

  @parameterized.parameters(0.0, -2.0, float('inf'))
  def test_a_factor_that_divides_nothing(self, factor):
    with self.assertRaisesRegex(errors.UserError, 'positive'):
      losses.normalizer(factor, np.ones((1, 2)), np.ones((1, 2)))


class PaddingTest(parameterized.TestCase):
  def test_padding_alone_is_exactly_nothing(self):
    module, params = tiny()
    kinds = (None, 3.0, *losses.NORMALIZERS)

    @jax.jit
    def graded(params, batch):
      return [
        jax.value_and_grad(
          objective.make_loss(
            module,
            objective.cross_entropy(normalizing_factor=kind, z_loss=1e-2),
          ),
          has_aux=True,
        )(params, batch)
        for kind in kinds
      ]

    for kind, ((value, metrics), grads) in zip(
      kinds, graded(params, batch_of([0, 0]))
    ):
      self.assertEqual(float(value), 0.0, kind)
      self.assertEqual(
          {name: float(metric) for name, metric in metrics.items()},
          dict(loss=0, z_loss=0, accuracy=0, tokens=0), kind,
      )  # fmt: skip
      for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf), str(kind))

  def test_weights_alone_say_what_counts(self):
    module, params = tiny()
    graded = jax.jit(
      jax.value_and_grad(objective.make_loss(module), has_aux=True)
    )
    batch = batch_of([5, 2])
    targets = batch['decoder_target_tokens']
    real = (targets > 0).astype(np.float32)

    def loss(targets, weights):
      return graded(params, {
          **batch, 'decoder_target_tokens': targets,
          'decoder_loss_weights': weights,
      })  # fmt: skip

    (expected, metrics), _ = loss(targets, real)
    # Weights that sum to less than 1 give their own mean.
    (light, others), _ = loss(targets, real / 16)
    self.assertLess(float(others['tokens']), 1)
    np.testing.assert_allclose(light, expected, rtol=1e-6)
    for name in ('loss', 'z_loss', 'accuracy'):
      np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
    # A target of no weight may be anything.
    (marked, _), grads = loss(np.where(real > 0, targets, -100), real)
    np.testing.assert_allclose(marked, expected, rtol=1e-6)
    self.assertTrue(all(np.isfinite(g).all() for g in jax.tree.leaves(grads)))

  def test_a_step_without_tokens_changes_nothing_but_its_number(self):
    optimizer = optim.adamw(0.1)  # with moments and a decay of weights
    module, params = tiny()
    made = step_lib.make_step(module, optimizer)
    step, state = jax.jit(made.update), made.init(params, jax.random.key(0))
    # optax raises floats to integer powers for Adam's bias correction.
    with jax.numpy_dtype_promotion('standard'):
      state, _ = step(state, batch_of([5, 2]))  # moments that would move it
      after, metrics = step(state, batch_of([0, 0]))
    self.assertEqual(int(after.step), 2)
    for name in ('params', 'opt_state'):
      jax.tree.map(
        np.testing.assert_array_equal,
        getattr(after, name),
        getattr(state, name),
      )
    self.assertEqual(float(metrics['grad_norm']), 0.0)

  def test_logs_say_that_there_was_nothing(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'm.jsonl'
    alone = {'loss': np.array(0.0), 'tokens': np.array(0.0)}
    callbacks.jsonl(path).on_log(1, alone)
    pair = {'loss': np.array([0.0, 2.5]), 'tokens': np.array([0.0, 3.0])}
    hook = callbacks.jsonl(path)
    hook.on_start(run_of(experts=['a', 'b']))
    hook.on_log(2, pair)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    self.assertEqual(rows, [
        {'step': 1, 'tokens': 0.0},
        {'step': 2, 'loss/b': 2.5, 'tokens/a': 0.0, 'tokens/b': 3.0},
    ])  # fmt: skip
    out = io.StringIO()
    hook = callbacks.progress(out)
    hook.on_start(run_of(phase='seed', steps=1))
    hook.on_log(1, alone)
    self.assertEqual(
      out.getvalue(), 'seed: step 1/1, no token to learn from: skipped\n'
    )
    out = io.StringIO()
    hook = callbacks.progress(out)
    hook.on_start(run_of(phase='seed', steps=2))
    hook.on_log(2, pair)
    self.assertEqual(out.getvalue(), 'seed: step 2/2, loss 2.500\n')


class CheckTest(parameterized.TestCase):
  @parameterized.product(
    name=['decoder_input_tokens', 'decoder_target_tokens'],
    token=[-1, VOCAB, 300],
    stacked=[False, True],
  )
  def test_tokens_outside_the_vocabulary(self, name, token, stacked):
    module, _ = tiny()
    batch = batch_of([5, 2])
    check = batches.checker(module, 'the task cola')
    if stacked:
      batch = {k: np.stack([v, v]) for k, v in batch.items()}
    check(batch)
    batch[name] = batch[name].copy()
    batch[name][..., 1, 3] = token
    with self.assertRaisesRegex(
      errors.UserError,
      rf'{name} of the task cola .* {token},.* lm model .* 0 to 10',
    ):
      check(batch)

  def test_labels_outside_the_classes(self):
    module = vision.MLP(vision.MLPConfig(classes=3))
    check = batches.checker(module)
    images = np.zeros((2, 28, 28, 1), np.float32)
    check({'images': images, 'labels': np.array([0, 2])})
    with self.assertRaisesRegex(errors.UserError, r'labels .* 3, .* 0 to 2'):
      check({'images': images, 'labels': np.array([0, 3])})

  def test_a_batch_of_padding_is_told_once(self):
    module, _ = tiny()
    err = io.StringIO()
    check = batches.checker(module, stream=err)
    check(batch_of([5, 0]))
    self.assertEqual(err.getvalue(), '')
    for _ in range(3):
      check(batch_of([0, 0]))
    self.assertLen(err.getvalue().splitlines(), 1)
    self.assertIn('no token to learn from', err.getvalue())
    # One expert of several, whose batches are stacked.
    err = io.StringIO()
    check = batches.checker(module, stream=err, stacked=True)
    pair = [batch_of([5, 2]), batch_of([0, 0])]
    check({name: np.stack([one[name] for one in pair]) for name in pair[0]})
    self.assertIn('no token to learn from', err.getvalue())


if __name__ == '__main__':
  absltest.main()
