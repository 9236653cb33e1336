# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Uniform, greedy and learned soups: goldens, laws, and being killed."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.core import errors
from mergejax.search import base
from mergejax.search import gradient
from mergejax.search import greedy


def soup_models(arrays):
  return [
    {'bias': arrays['bias'][k], 'kernel': arrays['kernel'][k]} for k in range(7)
  ]


def accuracy(params, x, y):
  logits = np.asarray(x) @ np.asarray(params['kernel'])
  logits = logits + np.asarray(params['bias'])
  return float((np.argmax(logits, axis=1) == y).mean())


class SoupGoldenTest(parameterized.TestCase):
  """In float64: accuracy is a step function."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))

  def test_uniform(self):
    arrays = goldens.load('model_soups')
    soup = greedy.uniform(soup_models(arrays))
    for name in ('kernel', 'bias'):
      np.testing.assert_allclose(
        soup[name], arrays[f'uniform_{name}'], rtol=1e-9
      )

  @parameterized.parameters(('gt', 'greedy'), ('ge', 'greedy_ge'))
  def test_greedy(self, accept, prefix):
    arrays = goldens.load('model_soups')
    calls = []

    def evaluate(params):
      calls.append(params)
      return accuracy(params, arrays['x_val'], arrays['y_val'])

    soup = greedy.greedy(soup_models(arrays), evaluate, accept=accept)
    np.testing.assert_allclose(soup.single_scores, arrays['individual_acc'])
    np.testing.assert_array_equal(soup.order, arrays['greedy_order'])
    np.testing.assert_array_equal(
      soup.ingredients, arrays[f'{prefix}_ingredients']
    )
    if accept == 'gt':
      np.testing.assert_allclose(
        soup.candidate_scores, arrays['greedy_candidate_acc']
      )
    self.assertAlmostEqual(soup.score, float(arrays[f'{prefix}_acc']))
    for name in ('kernel', 'bias'):
      np.testing.assert_allclose(
        soup.params[name], arrays[f'{prefix}_{name}'], rtol=1e-9
      )
    self.assertLen(calls, 7 + 6)

  def test_learned(self):
    arrays = goldens.load('model_soups')
    models = soup_models(arrays)
    order = {'k': 'kernel', 'b': 'bias'}
    rows = [order[str(c)] for c in arrays['learned_leaf_order']]

    def loss(params, batch, temperature):
      logits = temperature * (
        batch['x'] @ params['kernel'] + params['bias'][None]
      )
      log_p = jax.nn.log_softmax(logits)
      return -jnp.mean(jnp.take_along_axis(log_p, batch['y'][:, None], axis=1))

    batch = {'x': arrays['x_val'], 'y': arrays['y_val']}
    learned = gradient.learn(models, loss, [batch] * 10, granularity='leaf')
    np.testing.assert_allclose(
      learned.losses, arrays['learned_losses'], rtol=1e-9
    )
    for i, name in enumerate(rows):
      np.testing.assert_allclose(
        learned.raw[name], arrays['learned_alpha_raw_after10'][i], rtol=1e-9
      )
      np.testing.assert_allclose(
        learned.coefficients[name], arrays['learned_alpha_after10'][i],
        rtol=1e-9,
      )  # fmt: skip
      np.testing.assert_allclose(
        learned.params[name], arrays[f'learned_{name}_after10'], rtol=1e-9
      )
    self.assertAlmostEqual(
      learned.temperature, float(arrays['learned_beta_after10']), places=9
    )
    # With plain descent of rate 1, one update is the gradient itself.
    step = gradient.learn(
      models, loss, [batch], granularity='leaf', optimizer=optax.sgd(1.0)
    )
    for i, name in enumerate(rows):
      np.testing.assert_allclose(
        1 / 7 - step.raw[name], arrays['learned_grad_alpha_raw_step0'][i],
        rtol=1e-7, atol=1e-12,
      )  # fmt: skip
    self.assertAlmostEqual(
      1 - step.temperature, float(arrays['learned_grad_beta_step0']), places=9
    )


class GreedyTest(absltest.TestCase):
  def test_a_bad_model_is_left_out(self):
    rng = np.random.default_rng(0)
    good = [
      {'w': (1 + 0.1 * rng.normal(size=4)).astype(np.float32)} for _ in range(3)
    ]
    models = [*good, {'w': rng.normal(size=4).astype(np.float32) * 9}]
    loss = lambda params: float(np.square(params['w'] - 1).sum())
    soup = greedy.greedy(models, loss, higher_is_better=False)
    self.assertNotIn(3, soup.ingredients)
    self.assertLessEqual(soup.score, min(soup.single_scores))

  def test_undefined_scores_are_worst(self):
    models = [{'w': np.full(1, k, np.float32)} for k in range(3)]
    score = lambda p: float('nan') if p['w'][0] == 1 else float(p['w'][0])
    soup = greedy.greedy(models, score)
    self.assertEqual(soup.order[-1], 1)
    self.assertEqual(soup.ingredients, (2,))

  def test_integers_and_dtypes(self):
    models = [
      {'n': np.array([3]), 'w': np.full(2, k, jnp.bfloat16)} for k in range(2)
    ]
    soup = greedy.greedy(models, lambda p: 1.0)
    self.assertEqual(soup.params['w'].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(soup.params['n'], [3])

  def test_killed_and_resumed(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    models = [{'w': rng.normal(size=3).astype(np.float32)} for _ in range(4)]
    score = lambda p: -float(np.square(p['w']).sum())
    greedy.greedy(models, score, log=base.Log(folder / 'whole.jsonl'))
    for stop in (1, 3, 6):
      calls = []

      def evaluate(params, calls=calls, stop=stop):
        calls.append(1)
        if len(calls) > stop:
          raise KeyboardInterrupt
        return score(params)

      try:
        greedy.greedy(models, evaluate, log=base.Log(folder / 'log.jsonl'))
      except KeyboardInterrupt:
        with open(folder / 'log.jsonl', 'a') as stream:
          stream.write('{"point": [1')  # killed within a line
    soup = greedy.greedy(models, score, log=base.Log(folder / 'log.jsonl'))
    self.assertNotEmpty(soup.ingredients)
    self.assertEqual(
      (folder / 'log.jsonl').read_bytes(), (folder / 'whole.jsonl').read_bytes()
    )

  def test_bad_input(self):
    with self.assertRaisesRegex(errors.UserError, 'at least one'):
      greedy.greedy([], lambda p: 0.0)
    with self.assertRaisesRegex(errors.UserError, 'each of 0 to 0'):
      greedy.greedy([{'w': np.ones(1)}], lambda p: 0.0, order=[1])
    with self.assertRaisesRegex(errors.UserError, '- w'):
      greedy.greedy([{'w': np.ones(1)}, {'v': np.ones(1)}], lambda p: 0.0)


if __name__ == '__main__':
  absltest.main()
