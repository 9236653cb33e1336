# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Patching (PAINT): goldens, and tasks in conflict."""

from absl.testing import absltest
import goldens
import jax
import numpy as np

import mergejax as mj
from mergejax.core import errors
from mergejax.search import base
from mergejax.search import patch


class PaintGoldenTest(absltest.TestCase):
  """In float64: accuracy is a step function."""

  def setUp(self):
    super().setUp()
    self.enterContext(jax.enable_x64(True))
    self.arrays = goldens.load('paint')
    self.model = lambda name: {
      leaf: self.arrays[f'{name}__{leaf}'] for leaf in ('kernel', 'bias')
    }

  def check(self, params, name):
    for leaf in ('kernel', 'bias'):
      np.testing.assert_allclose(
        params[leaf], self.arrays[f'{name}__{leaf}'], rtol=1e-9
      )

  def scores_of_grid(self):
    """The stored accuracies, looked up by alpha."""
    zero, tuned = self.model('zeroshot'), self.model('ft0')
    moved = tuned['kernel'][0, 0] - zero['kernel'][0, 0]

    def evaluate(params):
      alpha = float((params['kernel'][0, 0] - zero['kernel'][0, 0]) / moved)
      i = int(np.argmin(np.abs(self.arrays['alpha_grid'] - alpha)))
      return {
        's0': self.arrays['supported_val_acc'][0, i],
        's1': self.arrays['supported_val_acc'][1, i],
        'p0': self.arrays['patching_val_acc'][0, i],
      }

    return evaluate

  def test_single(self):
    for alpha in (0.0, 0.3, 1.0):
      found = patch.at(self.model('zeroshot'), self.model('ft0'), alpha)
      self.check(found, f'patched_ft0_alpha{alpha}')
    done = patch.single(
      self.model('zeroshot'),
      self.model('ft0'),
      self.scores_of_grid(),
      patch.objective(['s0', 's1'], ['p0']),
    )
    np.testing.assert_allclose(
      [one.objective for one in done.log.candidates],
      self.arrays['selection_score'],
      rtol=1e-9,
    )
    self.assertAlmostEqual(done.alphas[0], float(self.arrays['selected_alpha']))

  def test_ends_are_exact_copies(self):
    zero, tuned = self.model('zeroshot'), self.model('ft0')
    for alpha, expected in ((0.0, zero), (1.0, tuned)):
      found = patch.at(zero, tuned, alpha)
      for leaf in found:
        np.testing.assert_array_equal(found[leaf], expected[leaf])

  def test_parallel(self):
    alphas = self.arrays['parallel_alphas'].tolist()
    tuned = [self.model(f'ft{i}') for i in range(3)]
    found = mj.merge(
      tuned, 'task_arithmetic', base=self.model('zeroshot'), weights=alphas
    )
    self.check(found, 'parallel')

  def test_sequential(self):
    first, second = self.arrays['sequential_alphas'].tolist()
    asked = []
    steps = [self.model('ft0'), self.model('sequential_ft2')]

    def evaluate(params, tasks):
      asked.append(tuple(tasks))
      return {task: 1.0 for task in tasks}

    def fine_tune(params, i):
      return steps[i]

    one = patch.sequential(
      self.model('zeroshot'), lambda p, i: steps[0], evaluate, ['s'], ['a'],
      alphas=[first],
    )  # fmt: skip
    self.check(one.params, 'sequential_patch1')
    two = patch.at(one.params, steps[1], second)
    self.check(two, 'sequential_patch2')
    asked.clear()
    patch.sequential(
      self.model('zeroshot'), fine_tune, evaluate, ['s'], ['a', 'b'],
      alphas=[0.0, 0.5],
    )  # fmt: skip
    self.assertEqual(asked, [('s', 'a')] * 2 + [('s', 'a', 'b')] * 2)


class PatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)).astype(np.float32)
    # Each task mostly looks at the feature that its labels are of.
    self.tasks = {
      'old': (x * np.float32([1, 0.3]), x[:, 0] > 0),
      'new': (x * np.float32([0.3, 1]), x[:, 1] > 0),
    }
    self.zero = {'w': np.array([1.0, 0], np.float32)}
    self.tuned = {'w': np.array([0, 1.0], np.float32)}

  def evaluate(self, params):
    return {
      name: float(np.equal(x @ np.asarray(params['w']) > 0, y).mean())
      for name, (x, y) in self.tasks.items()
    }

  def test_two_tasks_in_conflict(self):
    done = patch.single(
      self.zero, self.tuned, self.evaluate, patch.objective(['old'], ['new'])
    )
    self.assertBetween(done.alphas[0], 0.05, 0.95)
    mean = [one.objective for one in done.log.candidates]
    self.assertGreater(max(mean), max(mean[0], mean[-1]))
    before = self.evaluate(self.zero)
    bounded = patch.single(
      self.zero, self.tuned, self.evaluate,
      patch.objective(['old'], ['new'], most_lost=0.05, before=before),
    )  # fmt: skip
    after = self.evaluate(bounded.params)
    self.assertGreaterEqual(after['old'], before['old'] - 0.05)
    self.assertGreater(after['new'], before['new'])
    # The goal decides, and not the mean that a log has by itself.
    logged = patch.single(
      self.zero, self.tuned, self.evaluate,
      patch.objective(['old'], ['new'], most_lost=0.05, before=before),
      log=base.Log(),
    )  # fmt: skip
    self.assertEqual(logged.alphas, bounded.alphas)

  def test_joint_is_one_fine_tuning_and_one_alpha(self):
    done = patch.joint(
      self.zero, lambda params: self.tuned, self.evaluate, ['old'], ['new']
    )
    goal = patch.objective(['old'], ['new'])
    single = patch.single(self.zero, self.tuned, self.evaluate, goal)
    self.assertEqual(done.alphas, single.alphas)
    np.testing.assert_array_equal(done.params['w'], single.params['w'])

  def test_parallel_search(self):
    goal = patch.objective(['old'], ['new'])
    models = [self.tuned, {'w': np.array([1.0, 0.5], np.float32)}]
    runs = [
      patch.parallel(self.zero, models, self.evaluate, goal, budget=12)
      for _ in range(2)
    ]
    self.assertEqual(runs[0].alphas, runs[1].alphas)
    self.assertLen(runs[0].log.candidates, 12)
    alone = patch.parallel(self.zero, models[:1], self.evaluate, goal)
    single = patch.single(self.zero, self.tuned, self.evaluate, goal)
    self.assertEqual(alone.alphas, single.alphas)

  def test_bad_input(self):
    goal = patch.objective(['old'], ['new'])
    for message, call in (
      ('alpha goes from 0', lambda: patch.single(
          self.zero, self.tuned, self.evaluate, goal, alphas=[1.5])),
      ('should have been frozen', lambda: patch.single(
          self.zero, self.tuned, self.evaluate, goal, frozen='w')),
      ('not a regular expression', lambda: patch.single(
          self.zero, self.tuned, self.evaluate, goal, frozen='(w')),
      ('neww', lambda: patch.single(
          self.zero, self.tuned, self.evaluate,
          patch.objective(['old'], ['neww']))),
      ('at least one task', lambda: patch.objective(['old'], [])),
      ('both', lambda: patch.objective(['old'], ['old'])),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        call()


if __name__ == '__main__':
  absltest.main()
