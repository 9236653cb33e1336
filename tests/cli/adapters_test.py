# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters of a small T5 from the command line: searched, ranked, merged."""

import json
import pathlib
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import one_command
import small_adapted
import small_suite
import yaml

import mergejax as mj
from mergejax import models
from mergejax.core import tree
from mergejax.evaluation import metrics
from mergejax.evaluation import suite as suite_lib
from mergejax.experts import ensemble

CONFIG = dict(
  emb_dim=8, vocab_size=384, num_heads=2, head_dim=4, mlp_dim=8,
  num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


class AdaptersTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.folder = pathlib.Path(folder.name)
    cls.suite = small_suite.write(cls.folder, batch_size=12)
    cls.module = models.build({'model_type': 't5x', **CONFIG})
    plain = models.family_of(cls.module)
    # Drawn by NumPy, so nothing compiles.
    cls.base = small_adapted.leaves(plain.specs(), seed=9)
    cls.base_path = str(cls.folder / 'base')
    mj.save_checkpoint(
      cls.base_path, cls.base, config=models.describe(cls.module)
    )
    cls.library = cls.folder / 'library'
    cls.library.mkdir()
    # Kernels' changes by name, of ranks that differ.
    cls.deltas = {}
    for k, name in enumerate(('a', 'b')):
      adapter = mj.adapters.lora(rank=1 + k, alpha=2)
      family = mj.adapters.adapt(cls.module, adapter)
      leaves = small_adapted.leaves(family.adapter_specs, seed=k)
      params = family.joined(cls.base, leaves)
      mj.adapters.save(cls.library / name, family, params)
      folded = tree.flatten(mj.adapters.fold(family, params))
      cls.deltas[name] = {
        path: np.asarray(leaf) - np.asarray(tree.flatten(cls.base)[path])
        for path, leaf in folded.items()
      }

  def run_command(self, *arguments, code=0):
    found, out, err = one_command.run(*arguments)
    self.assertEqual(found, code, err)
    return err if code else out

  def summed(self, weights):
    """The base and both changes, by NumPy."""
    return {
      path: np.asarray(leaf)
      + sum(w * self.deltas[n][path] for w, n in zip(weights, 'ab'))
      for path, leaf in tree.flatten(self.base).items()
    }

  def test_few_shot_composition(self):
    """LoraHub: weights of adapters by a few examples, without a gradient."""
    merge = {
      'merge_method': 'task_arithmetic', 'base_model': self.base_path,
      'models': [str(self.library / name) for name in 'ab'],
    }  # fmt: skip
    request = self.folder / 'search.yaml'
    data = {'merge': merge, 'suite': str(self.suite), 'points': 3,
            'low': -1.0, 'high': 1.0}  # fmt: skip
    request.write_text(yaml.safe_dump(data))
    out = self.folder / 'found'
    text = self.run_command('search', request, out)
    self.assertIn('best ', text)
    lines = (out / 'candidates.jsonl').read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if 'point' in row]
    self.assertLen(rows, 9)
    evaluate = suite_lib.load(self.suite).evaluator(
      self.module, 'validation', ('task',)
    )
    for row in (rows[0], rows[5]):
      params = tree.unflatten(self.summed(row['point']))
      self.assertAlmostEqual(
        row['scores']['task'], float(evaluate(params)['task']), places=4
      )
    best = max(rows, key=lambda row: row['scores']['task'])
    self.assertNotEqual(best['point'], [0.0, 0.0])
    # What it found, as a model and as an adapter, is the same function.
    self.run_command('merge', out / 'recipe.yaml', self.folder / 'whole')
    _, whole = models.load_model(self.folder / 'whole')
    self.run_command(
      'merge', out / 'recipe.yaml', self.folder / 'one', '--format', 'adapter'
    )
    _, folded = mj.adapters.load_model(
      f'{self.base_path}+{self.folder / "one"}'
    )
    folded = tree.flatten(folded)
    merged = tree.flatten(whole)
    for path, leaf in self.summed(best['point']).items():
      np.testing.assert_allclose(merged[path], leaf, rtol=1e-5, atol=1e-5)
      if self.deltas['a'][path].any():  # of rank 3, and 2 is what fits
        gap = folded[path] - np.asarray(tree.flatten(self.base)[path])
        self.assertEqual(np.linalg.matrix_rank(gap.reshape(8, -1), 1e-4), 2)
      else:
        np.testing.assert_array_equal(folded[path], leaf)
    found = mj.adapters.ChangeStore(self.folder / 'one')
    self.assertEqual(set(found.ranks.values()), {2})
    self.assertEqual(found.base, mj.stats.fingerprint(self.base))
    data['merge'] = {**merge, 'format': 'adapter'}
    request.write_text(yaml.safe_dump(data))
    said = self.run_command('search', request, out, code=2)
    self.assertIn('leave `format: adapter` out', said)

  def test_a_base_under_our_names(self):
    # The adapter is named as Hugging Face names T5, the base as T5X does.
    a, b = (str(self.library / name) for name in 'ab')
    recipe = self.folder / 'ours.yaml'
    recipe.write_text(yaml.safe_dump({
      'merge_method': 'task_arithmetic', 'base_model': self.base_path,
      'models': [a, f'{self.base_path}+{b}'], 'parameters': {'lambda': 0.5},
    }))  # fmt: skip
    self.run_command('merge', recipe, self.folder / 'ours')
    found = tree.flatten(mj.open_checkpoint(self.folder / 'ours').read())
    memory = mj.merge(
      [f'{self.base_path}+{x}' for x in (a, b)], 'task_arithmetic',
      base=self.base_path, scale=0.5,
    )  # fmt: skip
    for path, leaf in self.summed((0.5, 0.5)).items():
      np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-5)
    for path, leaf in tree.flatten(memory).items():
      np.testing.assert_array_equal(found[path], leaf, path)

  def test_routing(self):
    library = mj.adapters.Library(self.library)
    batches = suite_lib.load(self.suite).batches('task', 'train')
    rank = lambda score: mj.select.rank(
      library.experts(self.module, self.base), {'task': batches}, score=score
    )
    table, out = rank('logme'), self.folder / 'table.json'
    self.run_command(
      'rank', self.base_path, '--adapters', self.library, '--suite',
      self.suite, '--json', out,
    )  # fmt: skip
    found = json.loads(out.read_text())
    self.assertLen(found, 3)
    for name in 'ab':
      self.assertAlmostEqual(
        found[f'{self.base_path}+{self.library / name}']['task'],
        table[name]['task'], places=4,
      )  # fmt: skip
    for scores in (table, rank('leep')):
      self.assertNotEqual(scores['a'], scores['b'])
    # The domain posterior: the expert that finds a text likely is chosen.
    nats = []
    for _, family, params in library.experts(self.module, self.base):
      found, _ = metrics.make_scorer(family, 'loss')(params, batches[:1])
      nats.append(-np.asarray(found))
    lp, mask = (
      np.stack(nats),
      np.asarray(batches[0]['decoder_target_tokens']) > 0,
    )
    posterior = ensemble.batch_posterior(lp, mask)
    totals = np.where(mask, lp, 0).sum(-1)
    rows = np.exp(totals - np.logaddexp(*totals))
    np.testing.assert_allclose(posterior, rows.mean(1), rtol=1e-4)

  def test_libraries(self):
    library = mj.adapters.Library(self.library)
    self.assertEqual([*library.cards], ['a', 'b'])
    self.assertIn('rank: 2', str(library))
    self.assertIn('lora', self.run_command('inspect', self.library))
    text = self.run_command('inspect', self.library / 'a')
    self.assertIn('rank: 1', text)
    self.assertIn(mj.stats.fingerprint(self.base), text)
    told = json.loads(self.run_command('inspect', self.library / 'a', '--json'))
    self.assertEqual(told['adapter']['ranks'], [1])
    told = json.loads(self.run_command('inspect', self.library, '--json'))
    self.assertEqual([told[name]['ranks'] for name in 'ab'], [[1], [2]])
    library.check(mj.stats.fingerprint(self.base))
    with self.assertRaisesRegex(mj.CheckpointError, 'another base'):
      library.check('0')
    other = jax.tree.map(lambda x: x + 1, self.base)
    with self.assertRaisesRegex(mj.CheckpointError, 'another base'):
      list(library.experts(self.module, other))
    with self.assertRaisesRegex(mj.ConfigError, 'adapter'):
      library.load('c', self.module)
    with self.assertRaisesRegex(mj.CheckpointError, 'holds no adapter'):
      mj.adapters.Library(self.folder / 'task')


if __name__ == '__main__':
  absltest.main()
