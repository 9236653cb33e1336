# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A forest on disk, as a user asks and prunes it."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
import drawn
import environments
import jax
import jax.numpy as jnp
import numpy as np
from one_command import run
import small_corpora
import small_vocabularies

import mergejax as mj
from mergejax import models
from mergejax.cli import infer
from mergejax.cli import loaded
from mergejax.core import tree
from mergejax.data import features
from mergejax.data import tasks
from mergejax.evaluation import forest_scores
from mergejax.experts import forest as forest_lib

SIZES = dict(
  model_type='lm', vocab_size=259, emb_dim=8, num_heads=1, head_dim=8,
  num_layers=1, mlp_dim=8,
)  # fmt: skip


class ForestCommandsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(environments.one_device())
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    small_corpora.write(cls.folder / 'text', small_corpora.DOMAINS)
    family = models.family_of(models.build(SIZES))
    # What they say is of no matter: drawn a little apart, and not trained.
    own = lambda seed: drawn.params(family, seed, size=0.1)
    cls.forest = forest_lib.create(
      cls.folder / 'forest', own(0), model=family, steps=4
    )
    for seed, name in enumerate(small_corpora.DOMAINS, 1):
      cls.forest.add(
        name, own(seed), domain=name, parents={'seed': 1.0}, steps=4
      )
    for name in small_corpora.DOMAINS:
      cls.forest.set_prior(name, [0.5, 0.25, 0.25])

  routed = staticmethod(forest_scores.routed)

  def refused(self, message, *arguments):
    code, _, err = run(*arguments)
    self.assertEqual(code, 2, err)
    self.assertRegex(err, message)
    self.assertNotIn('Traceback', err)

  def test_commands(self):
    """Create, add, list, update, average, evaluate, remove."""
    seed = self.forest.model('seed')
    mine = self.folder / 'mine'
    code, out, err = run('forest', 'create', mine, seed, '--steps', 4)
    self.assertEqual(code, 0, err)
    for name in ('colours', 'metals'):
      code, out, err = run(
        'forest', 'add', mine, name, self.forest.model(name),
        '--parents', 'seed=1', '--steps', 4, '--data_bytes', 9,
      )  # fmt: skip
      self.assertEqual(code, 0, err)
    self.assertIn('metals is one of 2 expert(s)', out)
    text = ['--corpora', self.folder / 'text', '--length', 8]
    self.refused(
      "none of .* is known", 'forest', 'evaluate', mine, *text,
      '--ensembles', 'cached',
    )  # fmt: skip
    code, out, err = run('forest', 'update', mine, *text)
    self.assertEqual(code, 0, err)
    self.assertRegex(out, r'numbers: \d\.\d+ colours, \d\.\d+ metals')
    prior = forest_lib.Forest(mine).prior('numbers')
    # Also of a domain that no expert is of.
    code, out, err = run('forest', 'list', mine)
    shares = ', '.join(
      f'{p:.3f} {n}' for p, n in zip(prior, ('colours', 'metals'))
    )
    self.assertIn(f'prior of numbers: {shares}\n', out)
    code, out, err = run('forest', 'list', mine, '--json')
    self.assertEqual(json.loads(out)['priors']['numbers'], prior.tolist())
    code, out, err = run(
      'forest', 'average', mine, self.folder / 'branch', '--weights',
      'posterior', '--domain', 'numbers',
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    self.assertRegex(out, 'began as: --parents colours=0')
    # Priors are estimated of the domain asked for, and only where they count.
    asked = []
    score = forest_scores.priors

    def priors(forest, sets, *given, **named):
      asked.append(list(sets))
      return score(forest, sets, *given, **named)

    with mock.patch.object(forest_scores, 'priors', priors):
      for kind in ('uniform', 'argmax'):
        code, out, err = run(
          'forest', 'average', mine, self.folder / f'of_{kind}', '--weights',
          kind, '--domain', 'numbers', *text,
        )  # fmt: skip
        self.assertEqual(code, 0, err)
    self.assertEqual(asked, [['numbers']])
    _, found = mj.load_model(self.folder / 'branch')
    experts = [
      tree.flatten(self.forest.params(n)) for n in ('colours', 'metals')
    ]
    for path, leaf in tree.flatten(found).items():
      mean = prior[0] * experts[0][path] + prior[1] * experts[1][path]
      np.testing.assert_allclose(leaf, mean, rtol=1e-4, atol=1e-6)
    code, out, err = run(
      'forest', 'evaluate', mine, *text, '--ensembles', 'cached,topk',
      '--weights', 'posterior,argmax', '--top_k', 1, '--json',
      self.folder / 'table.json',
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    rows = json.loads((self.folder / 'table.json').read_text())
    self.assertEqual(
      list(rows),
      ['seed', 'expert colours', 'expert metals', 'ensemble cached',
       'ensemble topk', 'average posterior', 'average argmax'],
    )  # fmt: skip
    # One expert is an ensemble of one, and an average of one.
    best = ('colours', 'metals')[int(np.argmax(prior))]
    value = lambda row: rows[row]['domains']['numbers']['bits_per_byte']
    self.assertAlmostEqual(value('ensemble topk'), value(f'expert {best}'), 5)
    self.assertEqual(value('average argmax'), value(f'expert {best}'))
    code, out, err = run('forest', 'list', mine)
    self.assertRegex(out, 'metals: domain metals; from 1 seed .*; 4 steps; 9 b')
    code, out, err = run('forest', 'remove', mine, 'metals')
    self.assertEqual(code, 0, err)
    code, out, err = run('forest', 'list', mine, '--json')
    self.assertEqual(list(json.loads(out)['experts']), ['colours'])
    self.refused('the last expert', 'forest', 'remove', mine, 'colours')
    # An ensemble of one answers as its expert does.
    lines = self.folder / 'lines.txt'
    lines.write_text('red green\niron\n')
    said = {}
    for name in (mine, self.forest.model('colours')):
      out = self.folder / 'said.jsonl'
      code, _, err = run(
        'infer', name, '--inputs', lines, '--out', out, '--length', 4,
        '--batch_size', 2, '--scores',
      )  # fmt: skip
      self.assertEqual(code, 0, err)
      said[name] = [json.loads(line) for line in out.read_text().splitlines()]
      out.unlink()
    for one, two in zip(*said.values(), strict=True):
      self.assertEqual(one['prediction'], two['prediction'])
      self.assertAlmostEqual(one['score'], two['score'], 4)

  def test_clusters_and_their_router(self):
    out = self.folder / 'clustered'
    code, said, err = run(
      'forest', 'cluster', self.folder / 'text', out, '--clusters', 3
    )
    self.assertEqual(code, 0, err)
    sizes = [int(x) for x in said.rsplit(': ', 1)[1].split(', ')]
    self.assertLessEqual(max(sizes) - min(sizes), 1)
    # A domain is a cluster, but for what equal sizes move.
    corpora = [
      (out / f'corpora/cluster_{i}/train.jsonl').read_text() for i in range(3)
    ]
    names = {'iron': 'metals', '22': 'numbers', 'grey': 'colours'}
    expert = {
      int(np.argmax([text.count(word) for text in corpora])): name
      for word, name in names.items()
    }
    self.assertLen(expert, 3)
    mine = self.folder / 'of_clusters'
    run('forest', 'create', mine, self.forest.model('seed'))
    for i in (2, 0, 1):
      code, _, err = run(
        'forest', 'add', mine, f'cluster_{i}', self.forest.model(expert[i]),
        '--parents', 'seed=1',
      )  # fmt: skip
      self.assertEqual(code, 0, err)
    flags = [
      '--corpora', out / 'corpora', '--length', 24, '--ensembles',
      'simple_average', '--router', out / 'router', '--top_k', 1,
      '--context', 12,
    ]  # fmt: skip
    sent = []

    def routed(lp, mask, weights, context):
      sent.append(weights[mask.any(axis=1)])  # others fill a batch
      # The first tokens are mixed alike, the others by the weights.
      found = self.routed(lp, mask, weights, context)
      mixed = np.log(np.einsum('bk,kbt->bt', weights, np.exp(lp)))
      np.testing.assert_allclose(
        found[:, 12:], (mixed * mask)[:, 12:], rtol=1e-4, atol=1e-5
      )
      mean = np.log(np.exp(lp).mean(axis=0)) * mask
      np.testing.assert_allclose(
        found[:, :12], mean[:, :12], rtol=1e-4, atol=1e-5
      )
      return found

    with mock.patch.object(forest_scores, 'routed', routed):
      code, said, err = run('forest', 'evaluate', mine, *flags)
    self.assertEqual(code, 0, err)
    self.assertIn('ensemble routed', said)
    # Experts came in another order than the clusters.
    names = list(forest_lib.Forest(mine).experts)
    self.assertEqual(names, ['cluster_2', 'cluster_0', 'cluster_1'])
    for i, weights in enumerate(sent):
      chosen = [names[k] for k in np.argmax(weights, axis=1)]
      self.assertGreater(chosen.count(f'cluster_{i}') / len(chosen), 0.8)
    self.refused(
      'The router has 3 clusters', 'forest', 'evaluate', self.forest.path,
      *flags,
    )  # fmt: skip

  def test_a_forest_as_a_model(self):
    family, params = loaded.load(self.forest.path, dtype='bfloat16')
    batch = family.example_batch(1, length=2)
    # Of thirds in bfloat16 the sum is not 1.
    np.testing.assert_array_equal(params['prior'], np.float32([1 / 3] * 3))
    self.assertEqual(jax.tree.leaves(params['experts'])[0].dtype, jnp.bfloat16)
    said = np.exp(family.logits(params, batch).astype(np.float32))
    np.testing.assert_allclose(said.sum(axis=-1), 1, rtol=1e-2)
    for named in ({'step': 3}, {'module': self.forest.module}):
      with self.assertRaisesRegex(mj.ConfigError, 'is a forest, whose models'):
        loaded.load(self.forest.path, **named)
    seed = self.folder / 'a_seed'
    forest_lib.create(seed, self.forest.model('seed'))
    with self.assertRaisesRegex(mj.ConfigError, 'has no expert yet: add one'):
      loaded.load(seed)

  def test_tasks_of_another_vocabulary_are_refused(self):
    """By seqio's name of a task, and in a suite of tasks."""
    folder = self.folder / 'pieces'
    folder.mkdir()
    model = small_vocabularies.pieces(folder)
    rows = ''.join(f'red {i}\tgreen {i}\n' for i in range(8))
    (folder / 'test.tsv').write_text('a\tb\n' + rows)
    suite = folder / 'suite.yaml'
    suite.write_text(
      f'vocabulary: {model}\nlengths: {{inputs: 8, targets: 8}}\ntasks:\n'
      f'  one:\n    files: {folder}\n'
      "    inputs: '{a}'\n    targets: '{b}'\n"
    )
    self.refused(
      'were trained with another vocabulary', 'evaluate', self.forest.path,
      '--suite', suite,
    )  # fmt: skip
    task = tasks.add_table_task(
      'of_pieces', {'test': folder / 'test.tsv'}, inputs='{a}', targets='{b}',
      vocabulary=features.vocabulary(model), by_content=True,
    )  # fmt: skip
    with self.assertRaisesRegex(mj.ConfigError, 'with another vocabulary'):
      infer.infer_task(
        checkpoint=self.forest.path, mixture_or_task=task,
        lengths={'inputs': 8, 'targets': 8}, output_dir=folder / 'out',
      )  # fmt: skip

  def test_an_expert_that_priors_do_not_know_is_told_of(self):
    mine = self.folder / 'told'
    forest = forest_lib.create(mine, self.forest.model('seed'))
    add = lambda name: run('forest', 'add', mine, name, forest.model('seed'))[1]
    self.assertNotIn('priors', add('one'))
    forest.set_prior('metals', [1.0])
    self.assertIn('the priors of metals give it 0 until', add('two'))
    self.assertEqual(forest.prior('metals').tolist(), [1, 0])

  def test_mistakes(self):
    place, out = self.forest.path, self.folder / 'none'
    for message, *arguments in (
      ("Unknown expert of .* 'colors'. Did you mean 'colours'", 'remove',
       place, 'colors'),
      ('is no forest', 'list', self.folder),
      ('Unknown kind of average', 'average', place, out, '--weights', 'mean'),
      ("goes by the prior of a domain", 'average', place, out, '--weights',
       'posterior'),
      ("Unknown domain with a prior in .* 'metal'. Did you mean 'metals'",
       'average', place, out, '--weights', 'posterior', '--domain', 'metal'),
      ('the domains colours, metals, numbers, and an average is for one',
       'average', place, out, '--weights', 'posterior', '--corpora',
       self.folder / 'text', '--length', '8'),
      ('top-k must be a whole number', 'average', place, out, '--weights', 'topk', '--top_k', '0',
       '--domain', 'metals'),
      ("Unknown merge method 'liner'", 'average', place, out, '--method',
       'liner'),
      ('--parents is a list such as', 'add', place, 'x', 'y', '--parents', 'a'),
      ('no checkpoint at', 'add', place, 'x', self.folder / 'y'),
      ('another vocabulary', 'add', place, 'x', self.forest.model('seed'),
       '--vocabulary', self.folder / 'forest' / 'forest.json'),
      ('invalid choice', 'grow', place),
      ("Unknown split 'tset'", 'evaluate', place, '--corpora',
       self.folder / 'text', '--split', 'tset'),
      ('here it would change nothing', 'evaluate', place, '--corpora',
       self.folder / 'text', '--top_k', '2'),
      ('seed must be a whole number', 'cluster', self.folder / 'text', out,
       '--clusters', '2', '--seed', '-1'),
      ('--context must be a whole number', 'evaluate', place, '--corpora',
       self.folder / 'text', '--context', '-1'),
    ):  # fmt: skip
      self.refused(message, 'forest', *arguments)
    self.assertFalse(out.exists())
    self.refused(
      'another vocabulary', 'infer', place, '--inputs', 'x.txt', '--out', out,
      '--vocabulary', small_vocabularies.pieces(self.folder),
    )  # fmt: skip
    lp = np.zeros((2, 1, 3))
    mask = np.ones((1, 3), bool)
    for message, mode, named in (
      ("Unknown ensemble 'cashed'. Did you mean 'cached'", 'cashed', {}),
      ("'cached' goes by a prior", 'cached', {}),
      ("needs the number", 'topk', {'prior': [0.5, 0.5]}),
      ('top-k must be', 'topk', {'prior': [0.5, 0.5], 'k': 0}),
      (r'\[3\] for 2 experts', 'cached', {'prior': [0.5, 0.25, 0.25]}),
    ):  # fmt: skip
      with self.assertRaisesRegex(mj.ConfigError, message):
        forest_scores.mixed(lp, mask, mode, **named)


if __name__ == '__main__':
  absltest.main()
