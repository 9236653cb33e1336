# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A forest on disk: what it keeps, and what it leaves alone."""

import fcntl
import json
import os
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree
from mergejax.experts import averages
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import forest as forest_lib
from mergejax.experts import manifest
from mergejax.experts import records
from mergejax.methods import arithmetic
from mergejax.training import arrays
from mergejax.training import optim
from mergejax.training import schedules
from mergejax.training import trainer as trainer_lib

SIZES = dict(
  model_type='lm', vocab_size=12, emb_dim=8, num_heads=2, head_dim=4,
  num_layers=1, mlp_dim=8,
)  # fmt: skip


def contents(folder):
  """`{path: bytes}` of all files, but for the lock."""
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(pathlib.Path(folder).rglob('*'))
    if file.is_file() and file.name != '.lock'
  }


class ForestTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.module = models.build(SIZES)
    cls.seed = jax.jit(models.family_of(cls.module).init)(jax.random.key(0))
    cls.seed = jax.tree.map(np.asarray, cls.seed)
    # One forest with three experts, copied by the tests.
    cls.made = pathlib.Path(tempfile.mkdtemp()) / 'forest'
    forest = forest_lib.create(cls.made, cls.seed, model=cls.module, steps=4)
    for i, name in enumerate('abc'):
      parents = {'seed': 1.0} if name != 'c' else {'a': 0.25, 'b': 0.75}
      how = 'seed' if name != 'c' else 'posterior'
      forest.add(
        name, cls.params(i), domain=f'{name} text', parents=parents,
        branched_by=how, steps=3, data={'bytes': 100},
      )  # fmt: skip

  @classmethod
  def params(cls, i):
    return jax.tree.map(lambda x: x + np.float32(i + 1), cls.seed)

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path) / 'forest'
    shutil.copytree(self.made, self.folder)
    self.forest = forest_lib.Forest(self.folder)

  def same(self, found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)

  def close(self, found, expected):
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    jax.tree.map(near, found, expected)

  def test_it_holds_what_was_added(self):
    experts = self.forest.experts
    self.assertEqual(list(experts), ['a', 'b', 'c'])
    self.assertEqual(experts['c'].parents, {'a': 0.25, 'b': 0.75})
    self.assertEqual(experts['c'].domain, 'c text')
    self.assertEqual(self.forest.seed['steps'], 4)
    for i, name in enumerate(experts):
      self.same(self.forest.params(name), self.params(i))
      module, _ = mj.load_model(self.forest.model(name))
      self.assertEqual(module, self.forest.module)
    card = (self.forest.folder('c') / 'README.md').read_text()
    self.assertIn('began as: 0.25 a, 0.75 b (posterior)', card)
    self.assertIn(experts['c'].fingerprint, card)

  def test_it_can_be_moved(self):
    elsewhere = self.folder.parent / 'elsewhere'
    os.rename(self.folder, elsewhere)
    moved = forest_lib.Forest(elsewhere)
    self.same(moved.params('b'), self.params(1))
    for file in (elsewhere / 'forest.json', *elsewhere.rglob('README.md')):
      self.assertNotIn(str(self.folder.parent), file.read_text())
    moved.remove('a')
    self.assertEqual(list(moved.experts), ['b', 'c'])

  def test_adding_and_removing_leaves_every_byte(self):
    self.forest.set_prior('a text', [0.5, 0.25, 0.25])
    before = contents(self.folder)
    self.forest.add('d', self.params(7), parents={'b': 1.0})
    added = contents(self.folder)
    self.assertEqual(self.forest.prior('a text').tolist(), [0.5, 0.25, 0.25, 0])
    own = {name for name in added if name.startswith('experts/d/')}
    self.assertNotEmpty(own)
    for name in before:
      if name != 'forest.json':
        self.assertEqual(added[name], before[name], name)
    self.assertEqual(self.forest.remove('d'), [])
    self.assertEqual(contents(self.folder), before)

  def test_removing_tells_who_keeps_its_influence(self):
    self.forest.add('d', self.params(3), parents={'c': 1.0})
    self.forest.set_prior('x', [0.5, 0.2, 0.2, 0.1])
    others = {
      n: b for n, b in contents(self.folder).items()
      if n.startswith(('experts/b/', 'experts/c/', 'experts/d/', 'seed/'))
    }  # fmt: skip
    self.assertEqual(self.forest.remove('a'), ['c', 'd'])
    now = contents(self.folder)
    self.assertEqual({n: now[n] for n in others}, others)
    self.assertFalse((self.folder / 'experts' / 'a').exists())
    np.testing.assert_allclose(self.forest.prior('x'), [0.4, 0.4, 0.2])
    # Where they came from is not forgotten.
    self.assertTrue(records.from_seed(self.forest.ancestry, 'd'))
    with self.assertRaisesRegex(errors.ConfigError, 'was removed and is in'):
      self.forest.add('a', self.params(0))

  def test_killed_in_between_it_is_as_before(self):
    """After the folder of an expert, before the manifest names it."""
    before = (self.folder / 'forest.json').read_bytes()
    killed = mock.patch.object(manifest, 'write', side_effect=KeyboardInterrupt)
    with killed, self.assertRaises(KeyboardInterrupt):
      self.forest.add('d', self.params(3))
    self.assertTrue((self.folder / 'experts' / 'd').exists())
    self.assertEqual((self.folder / 'forest.json').read_bytes(), before)
    self.assertEqual(list(self.forest.experts), ['a', 'b', 'c'])
    self.forest.add('d', self.params(4))
    self.same(self.forest.params('d'), self.params(4))

  def test_a_removal_that_was_killed_is_ended_by_the_same_call(self):
    folder, remove = self.folder / 'experts' / 'a', shutil.rmtree

    def killed(path, **named):
      if path == folder:
        raise KeyboardInterrupt()
      remove(path, **named)

    with mock.patch.object(forest_lib.shutil, 'rmtree', killed):
      with self.assertRaises(KeyboardInterrupt):
        self.forest.remove('a')
    self.assertEqual(list(self.forest.experts), ['b', 'c'])
    self.assertTrue(folder.exists())
    # No other name and no path takes a folder away.
    for name in ('x', '../seed', '../experts'):
      with self.assertRaises(errors.ConfigError):
        self.forest.remove(name)
    self.assertEqual(self.forest.remove('a'), ['c'])
    self.assertFalse(folder.exists())
    self.assertTrue(records.from_seed(self.forest.ancestry, 'c'))
    self.same(self.forest.params('seed'), self.seed)

  def test_of_two_that_add_one_name_the_first_is_kept(self):
    """The second had looked before the first was there."""
    other = forest_lib.Forest(self.folder)
    look = self.forest._check_like_seed

    def meanwhile(*given):
      look(*given)
      other.add('d', self.params(3))

    with mock.patch.object(self.forest, '_check_like_seed', meanwhile):
      with self.assertRaisesRegex(errors.ConfigError, 'an expert d already'):
        self.forest.add('d', self.params(4))
    self.same(self.forest.params('d'), self.params(3))

  def test_files_go_while_nobody_else_changes_the_forest(self):
    remove, locked = shutil.rmtree, []

    def looked(folder, **named):
      with open(self.folder / '.lock', encoding='utf-8') as lock:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          locked.append(pathlib.Path(folder).name)
      remove(folder, **named)

    with mock.patch.object(forest_lib.shutil, 'rmtree', looked):
      self.forest.remove('a')
    self.assertIn('a', locked)

  @parameterized.parameters('uniform', 'argmax', 'posterior', 'topk')
  def test_averages(self, kind):
    prior = np.array([0.2, 0.5, 0.3])
    k = 2 if kind == 'topk' else None
    shares = averages.weights(self.forest, kind, prior=prior, k=k)
    expected = {
      'uniform': {'a': 1 / 3, 'b': 1 / 3, 'c': 1 / 3},
      'argmax': {'b': 1.0},
      'posterior': {'a': 0.2, 'b': 0.5, 'c': 0.3},
      'topk': {'b': 0.625, 'c': 0.375},
    }[kind]
    self.assertEqual(list(shares), list(expected))
    found = averages.average(self.forest, shares)
    numbers = dict(zip('abc', map(self.params, range(3))))
    if kind == 'argmax':
      self.same(found, numbers['b'])
    for path, leaf in tree.flatten(found).items():
      mean = sum(
        w * tree.flatten(numbers[n])[path].astype(np.float64)
        for n, w in expected.items()
      )
      np.testing.assert_allclose(leaf, mean, rtol=1e-5)
    # Out of core it is the same.
    out = self.folder.parent / 'average'
    mj.execute(mj.plan(averages.recipe(self.forest, shares)), out)
    self.close(mj.load_model(out)[1], found)

  def test_any_merge_has_the_seed_for_its_base(self):
    shares = averages.weights(self.forest, 'uniform')
    found = averages.average(self.forest, shares, 'task_arithmetic', scale=0.5)
    expected = mj.merge(
      [self.params(i) for i in range(3)],
      arithmetic.task_arithmetic(scale=0.5),
      base=self.seed, weights=list(shares.values()),
    )  # fmt: skip
    self.same(found, expected)
    words = averages.recipe(self.forest, shares, 'task_arithmetic', scale=0.5)
    self.assertEqual(words['parameters'], {'lambda': 0.5})
    out = self.folder.parent / 'merged'
    mj.execute(mj.plan(words), out)
    self.close(mj.load_model(out)[1], found)

  def test_strangers_are_told_of(self):
    self.forest.add('d', self.params(3))
    with self.assertLogs(level='WARNING') as logs:
      averages.average(self.forest, {'a': 0.5, 'd': 0.5})
    self.assertIn('Nothing says that d come from the seed', logs.output[0])
    with self.assertNoLogs(level='WARNING'):
      averages.average(self.forest, {'a': 0.5, 'c': 0.5})

  def test_mistakes(self):
    other = models.build({**SIZES, 'mlp_dim': 6})
    params = jax.jit(models.family_of(other).init)(jax.random.key(0))
    stranger = self.folder.parent / 'stranger'
    checkpoint.save_checkpoint(stranger, params, config=models.describe(other))
    file = self.folder.parent / 'text.model'
    file.write_bytes(b'another vocabulary')
    forest, mine = self.forest, self.params(0)
    alone = forest_lib.create(
      self.folder.parent / 'alone', self.seed, model=self.module
    )
    alone.add('one', mine)
    before = contents(self.folder)
    for call, message in (
      (lambda: forest.add('a', mine), 'has an expert a already'),
      (lambda: forest.add('seed', mine), "'seed' will not do"),
      (lambda: forest.add('../x', mine), 'will not do'),
      (lambda: forest.add('topk', mine), "'topk' will not do"),
      (lambda: forest.add('d', mine, statistics=['x/fisher', 'y/fisher']),
       'fisher, fisher are not all different'),
      (lambda: forest.add('d', mine, parents={'bb': 1.0}), 'a parent'),
      (lambda: forest.add('d', mine, parents={'a': 0.7}), 'sum to 0.7'),
      (lambda: forest.add('d', stranger), r'wi_0/kernel|mlp_dim'),
      (lambda: forest.add('d', {'w': np.ones(2)}), r'does not have the param'),
      (lambda: forest.add('d', mine, vocabulary=file), 'another vocabulary'),
      (lambda: forest.remove('x'), 'Unknown expert of'),
      (lambda: forest.remove('seed'), 'The seed stays'),
      (lambda: alone.remove('one'), 'the last expert'),
      (lambda: forest.set_prior('x', [0.5, 0.5]), r'\[2\] for 3 experts'),
      (lambda: forest.set_prior('x', [0.5, 0.5, 0.5]), 'not a distribution'),
      (lambda: averages.weights(forest, 'mean'), 'Unknown kind of average'),
      (lambda: averages.weights(forest, 'aa'), "Did you mean 'a'"),
      (lambda: averages.weights(forest, 'posterior'), 'none is known'),
      (lambda: averages.weights(forest, 'topk', prior=[0.5, 0.25, 0.25], k=0),
       'top-k must be a whole number'),
      (lambda: averages.average(forest, {'a': 1.0}, 'fisher'),
       'needs a fisher of every expert, and a has none'),
      (lambda: forest_lib.Forest(self.folder.parent), 'is no forest'),
      (lambda: forest_lib.create(self.folder, self.seed), 'already exists'),
      (lambda: forest_lib.create(self.folder / 'x', self.seed),
       'give the module'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        call()
    self.assertEqual(contents(self.folder), before)

  def test_a_damaged_manifest_is_told_of(self):
    file = self.folder / 'forest.json'
    whole = json.loads(file.read_text())
    for change, message in (
      (lambda d: d.pop('experts'), 'does not tell experts'),
      (lambda d: d.update(seed=3), 'does not tell seed'),
      (
        lambda d: d['experts']['b'].pop('domain'),
        'expert b: the record has no',
      ),
      (lambda d: d['experts']['b'].update(bogus=1), "record says 'bogus'"),
      (lambda d: d['experts'].update(b=None), 'expert b: the record has no'),
      (lambda d: d['experts']['c'].update(parents={'a': 0.1}), 'sum to 0.1'),
    ):
      data = json.loads(json.dumps(whole))
      change(data)
      file.write_text(json.dumps(data))
      with self.assertRaisesRegex(errors.UserError, message):
        _ = self.forest.experts

  def test_a_newer_version_is_not_guessed_at(self):
    file = self.folder / 'forest.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'version': 2}))
    with self.assertRaisesRegex(errors.CheckpointError, 'is of version 2'):
      forest_lib.Forest(self.folder)


def rows(expert):
  rng = np.random.default_rng(expert)
  targets = rng.integers(2, 12, (8, 4)).astype(np.int32)
  inputs = np.pad(targets[:, :-1], [(0, 0), (1, 0)])
  return {'decoder_input_tokens': inputs, 'decoder_target_tokens': targets}


class BeginningsTest(absltest.TestCase):
  """Branches go on where the seed, or several experts, stopped."""

  def test_branches(self):
    promotion = jax.numpy_dtype_promotion('standard')
    promotion.__enter__()  # optax raises floats to integer powers
    self.addCleanup(promotion.__exit__, None, None, None)
    module = models.build(SIZES)
    rate = schedules.warmup_cosine(peak=0.05, warmup_steps=1, final_share=0.1)
    optimizer = optim.adamw(rate, steps=4)
    trainer = trainer_lib.Trainer(module, optimizer)
    fit = lambda expert, steps, **begin: trainer.fit(
      arrays.ArrayStream(rows(expert), 8, seed=expert), steps=steps, **begin
    )
    host = lambda state: jax.tree.map(np.asarray, state)
    seed = host(fit(0, 2))
    folder = pathlib.Path(self.create_tempdir().full_path) / 'forest'
    forest = forest_lib.create(
      folder, seed.params, model=module, steps=2, state=beginnings.kept(seed)
    )
    key = jax.random.key(7)
    begin = lambda shares, **how: beginnings.begin(
      forest, shares, trainer, steps=4, key=key, **how
    )
    # One parent: the run goes on as if it had not stopped.
    first = begin({'seed': 1.0})
    self.assertEqual(first.step, 2)
    jax.tree.map(np.testing.assert_array_equal, first.opt_state, seed.opt_state)
    ended = [host(fit(i, 4, state=first)) for i in (1, 2)]
    for i, state in enumerate(ended):
      forest.add(
        f'e{i}', state.params, parents={'seed': 1.0}, steps=2,
        state=beginnings.kept(state),
      )  # fmt: skip
    # Two: parameters and moments are averaged, and the schedule is the seed's.
    both = begin({'e0': 0.25, 'e1': 0.75})
    self.assertEqual(both.step, 2)
    found = tree.flatten({'p': both.params, 'o': both.opt_state})
    one, two = [
      tree.flatten({'p': each.params, 'o': each.opt_state}) for each in ended
    ]
    counts = {}
    for path, leaf in found.items():
      if path.endswith('count'):
        counts[path] = int(leaf)
        continue
      np.testing.assert_allclose(
        leaf, 0.25 * one[path] + 0.75 * two[path], rtol=1e-5, atol=1e-8
      )
    # Four gradients are in the moments; the learning rate stands at step 2.
    self.assertEqual(sorted(counts.values()), [2, 4])
    anew = begin({'e0': 1.0}, reset_optimizer=True, reset_schedule=True)
    self.assertEqual(anew.step, 0)
    for path, leaf in tree.flatten(anew.opt_state).items():
      np.testing.assert_array_equal(leaf, 0, path)
    forest.add('bare', ended[0].params, parents={'seed': 1.0})
    with self.assertLogs(level='WARNING') as logs:
      bare = begin({'bare': 1.0})
    self.assertIn('bare of', logs.output[0])
    self.assertEqual(
      sorted(
        int(x) for p, x in tree.flatten(bare.opt_state).items()
        if p.endswith('count')
      ), [0, 2],
    )  # fmt: skip

    # Side by side each begins as itself, whoever is beside it.
    side = branch.BranchTrainer(module, optimizer, experts=['x', 'y'])
    stream = lambda: branch.StackedStream(
      [arrays.ArrayStream(rows(i), 8, seed=i) for i in (1, 2)]
    )
    together = host(side.fit(stream(), steps=4, state=[first, both]))
    for i, begun in enumerate((first, both)):
      alone = host(fit(i + 1, 4, state=begun))
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        branch.unstack(together.params, i), alone.params,
      )  # fmt: skip
    for states, message in (
      ([first], '2 experts were given 1'),
      ([first, first.replace(step=np.int32(3))], r'have made \[2, 3\]'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, message):
        side.fit(stream(), steps=4, state=states)

  def test_schedules_of_stacks_stand_where_the_seed_stopped(self):
    """Kernels of experts have a schedule for each; counts of moments stay."""
    count = lambda *shape: np.zeros(shape, np.int32)
    state = {
      'stacked': {'kernel': {'0': {'count': count(8), 'v': np.ones(8)},
                             '1': {'count': count(8)}}},
      'rest': {'1': {'count': count()}},
    }  # fmt: skip
    found = beginnings.at_step(state, 7)
    wanted = tree.map_paths(
      lambda path, leaf: leaf + 7 if path.endswith('1/count') else leaf, state
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
      found, wanted,
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
