# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merge methods against vectors made by the original authors' code."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import numpy as np

import mergejax as mj


def tree_of(arrays, prefix):
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix) and array.dtype == np.float64
  }


class GoldensTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    x64 = jax.enable_x64(True)
    x64.__enter__()
    self.addCleanup(x64.__exit__, None, None, None)

  def check(self, actual, expected):
    self.assertNotEmpty(expected)
    for path, leaf in expected.items():
      self.assertEqual(actual[path].dtype, np.float64)
      np.testing.assert_allclose(actual[path], leaf, rtol=1e-9, err_msg=path)

  def test_task_arithmetic(self):
    arrays = goldens.load('task_arithmetic')
    pre = tree_of(arrays, 'pre__')
    models = [tree_of(arrays, f'ft{i}__') for i in range(3)]
    self.check(
      mj.merge(models, 'task_arithmetic', base=pre, scale=0.8),
      tree_of(arrays, 'add_all_lam0.8__'),
    )
    self.check(
      mj.merge(models[:1], 'negate', base=pre, scale=0.5),
      tree_of(arrays, 'negate_t0_lam0.5__'),
    )
    self.check(
      mj.merge(models, 'analogy', base=pre),
      tree_of(arrays, 'analogy_C2_B1_A0_lam1__'),
    )

  def test_integer_leaf_stays_that_of_the_base(self):
    arrays = goldens.load('task_arithmetic')
    pre = {'emb': arrays['pre__emb'], 'step': arrays['pre__step']}
    tuned = {'emb': arrays['ft0__emb'], 'step': np.array([10])}
    with self.assertLogs(level='WARNING') as logs:
      merged = mj.merge([tuned], 'negate', base=pre, scale=0.5)
    self.assertIn('step', logs.output[0])
    np.testing.assert_array_equal(merged['step'], arrays['negated__step'])

  def test_paint(self):
    arrays = goldens.load('paint')
    base = tree_of(arrays, 'zeroshot__')
    models = [tree_of(arrays, f'ft{i}__') for i in range(3)]
    for alpha in (0.0, 0.3, 1.0):
      self.check(
        mj.merge(models[:1], 'interpolate', base=base, alpha=alpha),
        tree_of(arrays, f'patched_ft0_alpha{alpha}__'),
      )
    self.check(
      mj.merge(
        models,
        'task_arithmetic',
        base=base,
        weights=arrays['parallel_alphas'],
      ),
      tree_of(arrays, 'parallel__'),
    )

  def test_interpolation_ends_are_exact(self):
    arrays = goldens.load('paint')
    base, model = (tree_of(arrays, p) for p in ('zeroshot__', 'ft0__'))
    for alpha, end in ((0, base), (1, model)):
      merged = mj.merge([model], 'interpolate', base=base, alpha=alpha)
      for path, leaf in end.items():
        np.testing.assert_array_equal(merged[path], leaf)

  def test_uniform_soup(self):
    arrays = goldens.load('model_soups')
    models = [
      {'kernel': arrays['kernel'][i], 'bias': arrays['bias'][i]}
      for i in range(7)
    ]
    merged = mj.merge(models, 'linear')
    np.testing.assert_allclose(
      merged['kernel'], arrays['uniform_kernel'], rtol=1e-9
    )
    np.testing.assert_allclose(
      merged['bias'], arrays['uniform_bias'], rtol=1e-9
    )


class MistakesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.a = {'w': np.zeros(2, np.float32), 'b': np.zeros(1, np.float32)}

  @parameterized.parameters(
    (dict(models=[]), 'at least one model'),
    (dict(method='linaer'), "Did you mean 'linear'"),
    (dict(method='interpolate'), "needs 'alpha'"),
    (dict(method='task_arithmetic', scal=1), "Did you mean 'scale'"),
    (dict(method='task_arithmetic'), 'common ancestor'),
    (dict(weights=[1.0]), '1 weight'),
    (dict(weights=[1.0, float('nan')]), 'finite'),
    (dict(weights=[1.0, -1.0]), 'sum to zero'),
    (dict(method='analogy', base={}), 'exactly 3'),
  )
  def test_teaches(self, change, message):
    arguments = dict(models=[self.a, self.a], method='linear') | change
    if 'base' in arguments:
      arguments['base'] = self.a
    with self.assertRaisesRegex(mj.UserError, message):
      mj.merge(arguments.pop('models'), arguments.pop('method'), **arguments)

  def test_differing_trees_are_listed(self):
    other = {'w': np.zeros(3, np.float32), 'c': np.zeros(1, np.float32)}
    with self.assertRaises(mj.UserError) as caught:
      mj.merge([self.a, other], 'linear')
    text = str(caught.exception)
    for line in ('! w [2] expected, [3] given', '- b [1]', '+ c [1]'):
      self.assertIn(line, text)


if __name__ == '__main__':
  absltest.main()
