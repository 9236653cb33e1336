# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`search` on small image models."""

import importlib
import json
import pathlib
import shutil
import sys

from absl.testing import absltest
import jax
import numpy as np
import yaml

import mergejax as mj
from mergejax import models

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_images  # noqa: E402


class SearchTest(small_images.Case):
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
    self.assertBetween(rows[-1]['largest_class'], 1 / small_images.CLASSES, 1.0)
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

  def test_stacked_layers_have_no_coefficients_of_their_own(self):
    names = []
    for name in ('a', 'b'):
      module, params = models.load_model(self.path(name))
      axes = [('.*kernel', ('layers', 'mlp')), ('.*', ('mlp',))]
      names.append(str(self.path(f'stacked_{name}')))
      mj.save_checkpoint(
        names[-1], params, config=models.describe(module), axes=axes
      )
    merge = self.merge('linear', models=names)
    for strategy, granularity in (('gradient', 'leaf'), ('random', 'block')):
      message = self.search(
        'stacked', code=2, merge=merge, strategy=strategy,
        granularity=granularity, budget=2,
      )  # fmt: skip
      self.assertIn('stacks of layers or experts', message)
      self.assertIn('stacked_a', message)

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
      ('has no adapter_model.safetensors', dict(vary='scale', merge=self.merge(
          models=[str(self.path('a')), str(adapter)]))),
    ):  # fmt: skip
      self.assertIn(message, self.search('wrong', code=2, **fields))


if __name__ == '__main__':
  absltest.main()
