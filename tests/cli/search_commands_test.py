# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`stats`, `align`, `rank`, `search` and `evaluate` on small image models."""

import contextlib
import importlib
import io
import json
import pathlib
import shutil
import sys
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import yaml

import mergejax as mj
from mergejax import models
from mergejax import statistics
from mergejax.cli import main as main_lib

CLASSES = 3


class CommandsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    rng = np.random.default_rng(0)
    for task in ('left', 'right'):
      (cls.folder / task).mkdir()
      for split in ('train', 'validation', 'test'):
        labels = rng.integers(0, CLASSES, 60)
        images = rng.integers(0, 90, (60, 4, 4))
        column = labels if task == 'left' else (labels + 1) % CLASSES
        images[np.arange(60), :, column] += 150
        np.savez(
          cls.folder / task / f'{split}.npz',
          images=images.astype(np.uint8), labels=labels.astype(np.uint8),
        )  # fmt: skip
    cls.suite = cls.folder / 'suite.yaml'
    tasks = {t: {'images': str(cls.folder / t)} for t in ('left', 'right')}
    cls.suite.write_text(yaml.safe_dump({'tasks': tasks, 'batch_size': 16}))
    module = models.build(
      dict(model_type='mlp', hidden=(6,), image_shape=(4, 4, 1), classes=CLASSES)
    )  # fmt: skip
    for i, name in enumerate(('base', 'a', 'b')):
      params = models.family_of(module).init(jax.random.key(i))
      mj.save_checkpoint(
        cls.folder / name, params, config=models.describe(module)
      )

  def run_command(self, *arguments, code=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      found = main_lib.main([str(a) for a in arguments])
    self.assertEqual(found, code, err.getvalue())
    return out.getvalue() if code == 0 else err.getvalue()

  def path(self, name):
    return self.folder / name

  def recipe(self, name, data):
    path = self.folder / f'{name}.yaml'
    path.write_text(yaml.safe_dump(data))
    return path

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
           image_shape=(4, 4, 1), classes=CLASSES)
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
    np.testing.assert_allclose(
      models.family_of(module).logits(moved, batch),
      models.family_of(module).logits(before, batch), rtol=1e-4, atol=1e-5,
    )  # fmt: skip
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

  def merge(self, method='task_arithmetic', **fields):
    recipe = {
      'merge_method': method,
      'models': [str(self.path('a')), str(self.path('b'))], **fields,
    }  # fmt: skip
    if method not in ('linear', 'regmean'):
      recipe['base_model'] = str(self.path('base'))
    return recipe

  def search(self, name, code=0, **fields):
    recipe = self.recipe(
      name, {'merge': self.merge(), 'suite': str(self.suite), **fields}
    )
    return self.run_command(
      'search', recipe, self.path(f'{name}_out'), code=code
    )

  def test_search_gives_a_recipe_that_reproduces_its_winner(self):
    own = [
      {'model': str(self.path('a')), 'parameters': {'weight': 0.2, 'density': 0.6}},
      {'model': str(self.path('b')), 'parameters': {'weight': 0.9, 'density': 0.4}},
    ]  # fmt: skip
    for name, fields in (
      ('grid', dict(vary='scale', points=5)),
      ('simplex', dict(strategy='simplex', points=4,
                       merge=self.merge('linear'))),
      ('blocks', dict(
          strategy='one_plus_one', budget=4, granularity='block')),
      ('own', dict(vary='scale', points=3, merge=self.merge(
          'ties', models=own, dtype='float32', seed=3))),
      ('defaults', dict(vary='scale', points=3, low=0.2,
                        merge=self.merge('ties'))),
    ):  # fmt: skip
      text = self.search(name, evaluate='test', **fields)
      self.assertIn('the merge', text)
      out = self.path(f'{name}_out')
      self.run_command('merge', out / 'recipe.yaml', self.path(f'{name}_merge'))
      lines = (out / 'candidates.jsonl').read_text().splitlines()[1:]
      best = max(
        (json.loads(line) for line in lines),
        key=lambda row: np.mean(list(row['scores'].values())),
      )
      self.run_command(
        'evaluate', self.path(f'{name}_merge'), '--suite', self.suite,
        '--split', 'validation', '--json', self.path('v.json'),
      )  # fmt: skip
      table = json.loads(self.path('v.json').read_text())['raw']
      (row,) = table.values()
      for task, score in best['scores'].items():
        self.assertAlmostEqual(row['tasks'][task]['value'], score, places=5)
      self.assertTrue((out / 'scores.png').exists())
    recipe = yaml.safe_load((self.path('own_out') / 'recipe.yaml').read_text())
    self.assertEqual((recipe['dtype'], recipe['seed']), ('float32', 3))

  def test_rank_pick_merge_evaluate(self):
    text = self.search(
      'picked', vary='scale', points=3, rank={'pick': 1}, evaluate='test'
    )
    self.assertIn('picked', text)
    recipe = yaml.safe_load(
      (self.path('picked_out') / 'recipe.yaml').read_text()
    )
    self.assertLen(recipe['models'], 1)

  def test_rank_keeps_the_statistics_of_the_models_it_picks(self):
    for name in ('a', 'b'):
      self.run_command(
        'stats', 'gram', self.path(name), self.path(f'picked_{name}'),
        '--suite', self.suite,
      )  # fmt: skip
    grams = [str(self.path(f'picked_{n}')) for n in ('a', 'b')]
    fields = dict(vary='alpha', points=3, rank={'pick': 1})
    self.search('ranked', merge=self.merge('regmean', stats=grams), **fields)
    recipe = yaml.safe_load(
      (self.path('ranked_out') / 'recipe.yaml').read_text()
    )
    ((model, gram),) = zip(recipe['models'], recipe['stats'])
    self.assertEqual(model['model'][-1], gram[-1])
    message = self.search(
      'swapped', code=2, merge=self.merge('regmean', stats=grams[::-1]),
      **fields,
    )  # fmt: skip
    self.assertIn('fingerprint', message)

  def test_scores_of_a_model_that_has_changed_are_refused(self):
    module, params = models.load_model(self.path('a'))
    changing = str(self.path('changing'))
    config = models.describe(module)
    mj.save_checkpoint(changing, params, config=config, overwrite=True)
    merge = self.merge(models=[changing, str(self.path('b'))])
    self.search('changed', merge=merge, vary='scale', points=2)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    mj.save_checkpoint(changing, params, config=config, overwrite=True)
    self.assertIn(
      'other settings',
      self.search('changed', code=2, merge=merge, vary='scale', points=2),
    )

  def test_scores_of_a_method_that_has_changed_are_refused(self):
    file = self.path('method_of_search.py')
    text = (
      'import mergejax as mj\n\n\ndef scaled(*, by: float = 1.0):\n'
      '  return mj.task_arithmetic(scale=by)\n'
    )
    file.write_text(text)
    sys.path.insert(0, str(file.parent))
    self.addCleanup(sys.path.remove, str(file.parent))
    fields = dict(merge=self.merge('method_of_search:scaled'), vary='by')
    self.search('method', points=2, **fields)
    file.write_text(text.replace('=by', '=2 * by'))
    importlib.reload(sys.modules['method_of_search'])
    self.assertIn(
      'other settings:\n  method: ',
      self.search('method', code=2, points=2, **fields),
    )

  def test_scores_on_data_that_have_changed_are_refused(self):
    """The recipe and the suite have the same words as before."""
    data = self.path('changing_data')
    shutil.copytree(self.path('left'), data)
    suite = {'tasks': {'left': {'images': str(data)}}, 'batch_size': 16}
    file = self.recipe('changing_suite', suite)
    fields = dict(suite=str(file), vary='scale', points=2)
    self.search('data', **fields)
    self.search('data', **fields)
    with np.load(data / 'validation.npz') as archive:
      images, labels = archive['images'], archive['labels']
    np.savez(data / 'validation.npz', images=images, labels=labels[::-1])
    self.assertIn(
      'data/left/files: validation.npz', self.search('data', code=2, **fields)
    )
    self.recipe('changing_suite', {**suite, 'max_examples': 9})
    self.assertIn(
      'data/left/max_examples: 512 there, 9',
      self.search('data', code=2, **fields),
    )

  def test_adamerging_needs_no_label(self):
    self.search(
      'entropy', strategy='gradient', loss='entropy', budget=6,
      granularity='leaf', learning_rate=0.1,
    )  # fmt: skip
    rows = [
      json.loads(line)
      for line in (self.path('entropy_out') / 'candidates.jsonl')
      .read_text()
      .splitlines()
    ]
    self.assertLess(rows[-1]['loss'], rows[0]['loss'])
    self.assertBetween(rows[-1]['largest_class'], 1 / CLASSES, 1.0)
    self.run_command(
      'merge', self.path('entropy_out') / 'recipe.yaml',
      self.path('entropy_merge'),
    )  # fmt: skip

  def test_soups(self):
    merge = self.merge('linear')
    for strategy, extra in (
      ('greedy', {'accept': 'gt'}),
      ('gradient', {'budget': 4, 'granularity': 'block'}),
    ):
      text = self.search(strategy, strategy=strategy, merge=merge, **extra)
      out = self.path(f'{strategy}_out')
      self.run_command(
        'merge', out / 'recipe.yaml', self.path(f'{strategy}_merge')
      )
      recipe = yaml.safe_load((out / 'recipe.yaml').read_text())
      self.assertEqual(recipe['merge_method'], 'linear')
      lines = (out / 'candidates.jsonl').read_text().splitlines()
      if strategy == 'greedy':
        # Each model alone, then one soup; never worse than the best of them.
        rows = [json.loads(line) for line in lines[1:]]
        means = [np.mean(list(row['scores'].values())) for row in rows]
        self.assertLen(means, 3)
        kept = max(means[:2]) if len(recipe['models']) == 1 else means[2]
        self.assertGreaterEqual(kept, max(means[:2]))
        self.assertIn(f'{kept:.4f}', text)
      else:
        self.assertLen(lines, 4)
        # Of every block the coefficients lie on the simplex.
        as_list = lambda w: w if isinstance(w, list) else [{'value': w}]
        first, second = (
          as_list(m['parameters']['weight']) for m in recipe['models']
        )
        for one, other in zip(first, second):
          self.assertEqual(one.get('filter'), other.get('filter'))
          self.assertAlmostEqual(one['value'] + other['value'], 1.0, places=5)

  def test_a_search_over_one_model(self):
    self.search(
      'alone', vary='scale', points=3,
      merge=self.merge(models=[str(self.path('a'))]),
    )  # fmt: skip
    recipe = yaml.safe_load(
      (self.path('alone_out') / 'recipe.yaml').read_text()
    )
    self.assertLen(recipe['models'], 1)

  def test_mistakes(self):
    adapter = self.path('adapter')
    adapter.mkdir()
    (adapter / 'adapter_config.json').write_text('{}')
    for message, fields in (
      ("Did you mean 'grid'", dict(strategy='gird')),
      ("Did you mean 'left'", dict(tasks=['leftt'])),
      ("Did you mean 'scale'", dict(vary='scael')),
      ('vary', dict(varry='scale')),
      ('is for gradient', dict(learning_rate=0.1)),
      ("Did you mean 'test'", dict(evaluate='tets')),
      ('a list of names', dict(tasks='left')),
      ('is for grid', dict(strategy='simplex', low=0.1)),
      ('points must be a whole number', dict(vary='scale', points='many')),
      ('what this search varies', dict(
          vary='scale', merge=self.merge(parameters={'lambda': 0.4}))),
      ('what this search varies', dict(
          vary='weights', merge=self.merge(parameters={'weight': 0.4}))),
      ('along the layers', dict(vary='scale', merge=self.merge(
          parameters={'weight': [0.1, 0.9]}))),
      ('coefficients of task_arithmetic', dict(
          strategy='gradient', merge=self.merge('ties'))),
      ('coefficients of linear', dict(strategy='greedy')),
      ('at a whole model', dict(granularity='block', merge=self.merge(
          'ties', parameters={'trim_scope': 'global'}))),
      ('AdaMerging', dict(
          strategy='gradient', loss='entropy', merge=self.merge('linear'))),
      ('number of models', dict(vary='scale', rank={'pick': 5})),
      ('nowhere', dict(vary='scale', merge=self.merge(
          models=[str(self.path('a')), 'nowhere']))),
      ('Fold the adapter', dict(vary='scale', merge=self.merge(
          models=[str(self.path('a')), str(adapter)]))),
    ):  # fmt: skip
      self.assertIn(message, self.search('wrong', code=2, **fields))
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
