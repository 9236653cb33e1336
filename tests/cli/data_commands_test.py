# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`stats`, `align`, `rank` and `evaluate` on small image models."""

import json
import pathlib
import sys

from absl.testing import absltest
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax import statistics

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_images  # noqa: E402


class DataCommandsTest(small_images.Case):
  def test_statistics_then_regmean_and_fisher(self):
    for kind in ('gram', 'fisher'):
      for name in ('a', 'b'):
        self.run_command(
          'stats', kind, self.path(name), self.path(f'{kind}_{name}'),
          '--suite', self.suite, '--task', 'left',
        )  # fmt: skip
      recipe = self.recipe(kind, {
          'merge_method': 'regmean' if kind == 'gram' else 'fisher',
          'models': [str(self.path('a')), str(self.path('b'))],
          'stats': [str(self.path(f'{kind}_{n}')) for n in ('a', 'b')],
      })  # fmt: skip
      out = self.path(f'merged_{kind}')
      self.run_command('merge', recipe, out)
      expected = mj.merge(
        [self.path('a'), self.path('b')],
        'regmean' if kind == 'gram' else 'fisher',
        stats=[statistics.load(self.path(f'{kind}_{n}')) for n in ('a', 'b')],
      )
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        mj.open_checkpoint(out).read(),
        expected,
      )
    text = self.run_command(
      'evaluate', self.path('a'), recipe, '--suite', self.suite,
      '--json', self.path('table.json'),
    )  # fmt: skip
    self.assertIn('left', text)
    table = json.loads(self.path('table.json').read_text())['raw']
    self.assertLen(table, 2)
    score = table[str(self.path('a'))]['tasks']['left']
    self.assertBetween(score['value'], score['low'], score['high'])

  def test_norms_are_measured_on_all_tasks(self):
    module = models.build(
      dict(model_type='vgg', channels=(3,), dense=(), norm='batch',
           image_shape=(4, 4, 1), classes=small_images.CLASSES)
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    mj.save_checkpoint(
      self.path('with_norms'), params, config=models.describe(module)
    )
    self.run_command(
      'stats', 'norms', self.path('with_norms'), self.path('measured'),
      '--suite', self.suite,
    )  # fmt: skip
    _, found = models.load_model(self.path('measured'))
    # Nothing is left of what the model came with, however far off.
    far = {
      **params,
      'batch_stats': jax.tree.map(lambda x: x + 9, params['batch_stats']),
    }
    mj.save_checkpoint(self.path('far'), far, config=models.describe(module))
    self.run_command(
      'stats', 'norms', self.path('far'), self.path('far_measured'),
      '--suite', self.suite,
    )  # fmt: skip
    _, again = models.load_model(self.path('far_measured'))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=0.01, atol=1e-3),
      again['batch_stats'], found['batch_stats'],
    )  # fmt: skip
    kernels = lambda tree: {n: x for n, x in tree.items() if n != 'batch_stats'}
    jax.tree.map(np.testing.assert_array_equal, kernels(found), kernels(params))
    message = self.run_command(
      'stats', 'norms', self.path('a'), self.path('x'), '--suite', self.suite,
      code=2,
    )  # fmt: skip
    self.assertIn('no batch norms', message)

  def test_survey(self):
    text = self.run_command(
      'stats', 'survey', self.path('base'), self.path('a'), self.path('b'),
      '--plot', self.path('survey.png'),
    )  # fmt: skip
    self.assertIn('whole model', text)
    self.assertTrue(self.path('survey.png').exists())

  def test_align(self):
    text = self.run_command(
      'align', self.path('a'), self.path('b'), self.path('aligned'),
      '--permutation', self.path('permutation.npz'),
    )  # fmt: skip
    self.assertIn('same outputs', text)
    module, moved = models.load_model(self.path('aligned'))
    _, before = models.load_model(self.path('b'))
    batch = models.family_of(module).example_batch(3)
    batch['images'] = batch['images'] + 0.3
    logits = jax.jit(models.family_of(module).logits)
    np.testing.assert_allclose(
      logits(moved, batch), logits(before, batch), rtol=1e-4, atol=1e-5
    )
    for method in ('activations', 'straight_through'):
      self.run_command(
        'align', self.path('a'), self.path('b'), self.path(method),
        '--method', method, '--suite', self.suite, '--steps', 3,
      )  # fmt: skip
    message = self.run_command(
      'align', self.path('a'), self.path('b'), self.path('x'),
      '--method', 'activations', code=2,
    )  # fmt: skip
    self.assertIn('--suite', message)
    message = self.run_command(
      'align', self.path('a'), self.path('b'), self.path('x'), '--tries', 0,
      code=2,
    )  # fmt: skip
    self.assertIn('--tries must be 1 or above, not 0', message)
    # What exists is told before anything is matched or written.
    message = self.run_command(
      'align', self.path('a'), self.path('b'), self.path('x'),
      '--permutation', self.path('permutation.npz'), code=2,
    )  # fmt: skip
    self.assertIn('permutation.npz already exists', message)
    self.assertFalse(self.path('x').exists())

  def test_axes_that_only_the_checkpoint_tells_stay_with_it(self):
    module, params = models.load_model(self.path('b'))
    axes = {'dense_0/kernel': ('inputs', 'outputs')}
    mj.save_checkpoint(
      self.path('told'), params, config=models.describe(module), axes=axes
    )
    self.run_command(
      'align', self.path('a'), self.path('told'), self.path('kept')
    )
    self.assertEqual(mj.open_checkpoint(self.path('kept')).axes(), axes)

  def test_rank(self):
    text = self.run_command(
      'rank', self.path('a'), self.path('b'), '--suite', self.suite,
      '--json', self.path('rank.json'),
    )  # fmt: skip
    self.assertIn(' > ', text)
    table = json.loads(self.path('rank.json').read_text())
    self.assertEqual(set(table[str(self.path('a'))]), {'left', 'right'})
    self.run_command(
      'rank', self.path('a'), '--suite', self.suite, '--score', 'leep'
    )

  def test_mistakes(self):
    other = models.build(
      dict(model_type='mlp', hidden=(5,), image_shape=(4, 4, 1), classes=2)
    )
    mj.save_checkpoint(
      self.path('other'), models.family_of(other).init(jax.random.key(0)),
      config=models.describe(other), overwrite=True,
    )  # fmt: skip
    message = self.run_command(
      'align', self.path('a'), self.path('other'), self.path('x'), code=2
    )
    self.assertIn('does not have the parameters', message)
    message = self.run_command(
      'evaluate', self.path('other'), '--suite', self.suite, code=2
    )
    self.assertIn('outside the range', message)
    bad = self.recipe('bad_suite', {'tasks': {'x': {'images': 'left', 'metric': 'acuracy'}}})  # fmt: skip
    message = self.run_command('rank', self.path('a'), '--suite', bad, code=2)
    self.assertIn("'accuracy'", message)


if __name__ == '__main__':
  absltest.main()
