# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A forest as a user grows, kills, asks and prunes it."""

import contextlib
import io
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
import environments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_vocabularies

import mergejax as mj
from mergejax.cli import grow_forest
from mergejax.cli import infer
from mergejax.cli import loaded
from mergejax.cli import main
from mergejax.core import tree
from mergejax.data import features
from mergejax.data import tasks
from mergejax.evaluation import forest_scores
from mergejax.experts import forest as forest_lib
from mergejax.training import checkpoints

_GIN = """
from __gin__ import dynamic_registration
from mergejax.nn import lm
from mergejax.cli import grow_forest
from mergejax.cli import infer

include 'runs/forest.gin'
SEED_STEPS = 4
BRANCH_STEPS = 4
BATCH_SIZE = 4
LENGTH = 8
WARMUP_STEPS = 2
GENERATION = 2
SIDE_BY_SIDE = 1
grow_forest.Settings.save_every = 2
grow_forest.Settings.validation_sequences = 8
grow_forest.Settings.test_sequences = 8
lm.LMConfig:
  emb_dim = 8
  num_heads = 1
  head_dim = 8
  num_layers = 1
  mlp_dim = 8
"""


def run(*arguments):
  """`(exit code, stdout, stderr)`."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main.main([str(a) for a in arguments])
  return code, out.getvalue(), err.getvalue()


class Killed(BaseException):
  """What nothing catches."""


class ForestCommandsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(environments.one_device())
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    rng = random.Random(0)
    (cls.folder / 'text').mkdir()
    for domain, words in {
      'colours': ['red', 'green', 'blue', 'grey'],
      'metals': ['iron', 'lead', 'zinc', 'tin'],
      'numbers': ['11', '22', '33', '44'],
    }.items():
      rows = [' '.join(rng.choices(words, k=20)) for _ in range(40)]
      (cls.folder / 'text' / f'{domain}.jsonl').write_text(
        '\n'.join(json.dumps({'text': row}) for row in rows)
      )
    (cls.folder / 'small.gin').write_text(_GIN)
    code, cls.out, err = cls.grow('whole')
    assert code == 0, err[-3000:]
    cls.forest = forest_lib.Forest(cls.folder / 'whole' / 'forest')

  @classmethod
  def grow(cls, name, *flags):
    with jax.numpy_dtype_promotion('standard'):
      return run(
        'train', f'--gin_file={cls.folder}/small.gin',
        f'--gin.CORPORA={cls.folder}/text',
        f'--gin.MODEL_DIR={cls.folder}/{name}', *flags,
      )  # fmt: skip

  routed = staticmethod(forest_scores.routed)

  def refused(self, message, *arguments):
    code, _, err = run(*arguments)
    self.assertEqual(code, 2, err)
    self.assertRegex(err, message)
    self.assertNotIn('Traceback', err)

  def test_what_has_grown(self):
    experts = self.forest.experts
    self.assertEqual(list(experts), ['colours', 'metals', 'numbers'])
    self.assertEqual(experts['metals'].parents, {'seed': 1.0})
    # The second generation began as an average by its posterior.
    parents = experts['numbers'].parents
    self.assertEqual(set(parents), {'colours', 'metals'})
    self.assertAlmostEqual(sum(parents.values()), 1.0)
    self.assertEqual(experts['numbers'].branched_by, 'posterior')
    self.assertEqual(experts['numbers'].data['tokens seen'], 4 * 4 * 8)
    self.assertRegex(self.out, r'ensemble cached +\d')
    for domain in experts:
      self.assertAlmostEqual(self.forest.prior(domain).sum(), 1.0)
      self.assertIsNotNone(self.forest.state(domain))
    self.assertEmpty(list((self.folder / 'whole/train').glob('e*/checkpoints')))

  def test_killed_and_continued_it_is_the_same(self):
    """Killed while a chunk trains, between two experts, and moved."""
    save, saves = checkpoints.Checkpoints.save, []
    add, adds = forest_lib.Forest.add, []

    def killed_save(self, state, data):
      save(self, state, data)
      self.wait()
      saves.append(1)
      if len(saves) == 3:  # the seed has saved twice, its experts once
        raise Killed()

    def killed_add(self, name, *given, **named):
      if len(adds) == 1:
        raise Killed()
      adds.append(name)
      add(self, name, *given, **named)

    with mock.patch.object(checkpoints.Checkpoints, 'save', killed_save):
      with self.assertRaises(Killed):
        self.grow('killed')
    with mock.patch.object(forest_lib.Forest, 'add', killed_add):
      with self.assertRaises(Killed):
        self.grow('killed')
    place = self.folder / 'killed' / 'forest'
    self.assertEqual(list(forest_lib.Forest(place).experts), ['colours'])
    kept = (place / 'experts/colours/README.md').stat().st_mtime_ns
    moved = place.rename(self.folder / 'moved')
    code, _, err = self.grow('killed', f'--gin.FOREST={moved}')
    self.assertEqual(code, 0, err[-3000:])
    found = forest_lib.Forest(moved)
    after = (moved / 'experts/colours/README.md').stat().st_mtime_ns
    self.assertEqual(after, kept)
    self.assertEqual(
      (moved / 'forest.json').read_text(),
      (self.forest.path / 'forest.json').read_text(),
    )
    for name in self.forest.experts:
      one, two = found.params(name), self.forest.params(name)
      jax.tree.map(np.testing.assert_array_equal, one, two)
    tables = [
      (self.folder / name / 'table.json').read_text()
      for name in ('whole', 'killed')
    ]
    self.assertEqual(*tables)
    code, out, _ = self.grow('killed')
    self.assertIn('nothing was computed', out)

  def test_runs_that_are_refused(self):
    all_devices = mock.patch.object(jax, 'devices', jax.local_devices)
    self.enter_context(all_devices)
    place = f'--gin.FOREST={self.forest.path}'
    code, _, err = self.grow('twice', place)
    self.assertEqual(code, 2, err[-2000:])
    self.assertIn('has experts of colours, metals, numbers already', err)
    # What was refused may be asked for otherwise, in the same folder.
    self.assertFalse((self.folder / 'twice' / 'settings.json').exists())
    # What would fail after the first generation is refused before the seed.
    for message, *flags in (
      ("Unknown expert or average to branch from 'posterio'",
       '--gin.BRANCH_FROM=posterio'),
      ("branch from 'numbers'", '--gin.BRANCH_FROM=numbers'),
      ("'topk', which needs one", '--gin.BRANCH_FROM=topk'),
      ("Unknown merge method 'liner'",
       '--gin.grow_forest.Settings.merge=liner'),
      ('1 experts do not divide over 2 branches',
       "--gin.MESH={'branch': 2, 'data': 4}"),
    ):  # fmt: skip
      code, _, err = self.grow('early', *flags)
      self.assertEqual(code, 2, err[-2000:])
      self.assertIn(message, err)
      self.assertFalse((self.folder / 'early' / 'train').exists())
    code, _, err = self.grow('whole', '--gin.TOP_K=2')
    self.assertEqual(code, 2)
    self.assertIn('top_k: None there, 2 asked for', err)
    code, _, err = self.grow('other', place, '--gin.lm.LMConfig.mlp_dim=6')
    self.assertEqual(code, 2)
    self.assertIn('are another model than the configured', err)

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

  @pytest.mark.slow  # `training/processes_test` keeps the promise for all runs
  def test_two_processes_grow_the_same_forest(self):
    """An expert at a time on four devices each: what one writes all agree on."""
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    count = '--xla_force_host_platform_device_count=4'
    command = [
      sys.executable, '-m', 'mergejax', 'train',
      f'--gin_file={self.folder}/small.gin',
      f'--gin.CORPORA={self.folder}/text', f'--gin.MODEL_DIR={self.folder}/two',
      f'--coordinator_address={address}', '--process_count=2',
    ]  # fmt: skip
    processes = [
      subprocess.Popen(
        [*command, f'--process_index={i}'], stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=count),
      )
      for i in range(2)
    ]  # fmt: skip
    for process in processes:
      _, err = process.communicate(timeout=600)
      self.assertEqual(process.returncode, 0, err[-3000:])
    found = forest_lib.Forest(self.folder / 'two' / 'forest')
    self.assertEqual(list(found.experts), list(self.forest.experts))
    for name, expert in self.forest.experts.items():
      parents = found.experts[name].parents
      self.assertEqual(list(parents), list(expert.parents))
      for parent, share in expert.parents.items():
        self.assertAlmostEqual(parents[parent], share, places=5)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found.params(name), self.forest.params(name),
      )  # fmt: skip

  def test_what_is_said_of_a_beginning(self):
    how = lambda parents, **named: grow_forest._how(
      mock.Mock(**{'branch_from': 'posterior', 'merge': 'linear', **named}),
      parents,
    )
    self.assertEqual(how({'seed': 1.0}, merge='ties'), 'seed')
    self.assertEqual(how({'a': 0.5, 'b': 0.5}), 'posterior')
    self.assertEqual(how({'a': 0.5, 'b': 0.5}, merge='ties'), 'posterior, ties')

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
      ('at least 1', 'average', place, out, '--weights', 'topk', '--top_k', '0',
       '--domain', 'metals'),
      ("Unknown merge method 'liner'", 'average', place, out, '--method',
       'liner'),
      ('--parents is a list such as', 'add', place, 'x', 'y', '--parents', 'a'),
      ('no checkpoint at', 'add', place, 'x', self.folder / 'y'),
      ('another vocabulary', 'add', place, 'x', self.forest.model('seed'),
       '--vocabulary', self.folder / 'small.gin'),
      ('invalid choice', 'grow', place),
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
    with self.assertRaisesRegex(mj.ConfigError, 'generation must be'):
      grow_forest.Settings(
        module=None, optimizer=None, model_dir='x', batch_size=1, length=1,
        max_train_bytes=None, seed=0, seed_steps=1, branch_steps=1,
        branch_from='seed', generation=0,
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
