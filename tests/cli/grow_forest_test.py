# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A forest as a user grows it: in generations, killed, refused, in processes."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest
import environments
import jax
import numpy as np
from one_command import run
import pytest
import small_corpora

import mergejax as mj
from mergejax.cli import grow_forest
from mergejax.experts import forest as forest_lib
from mergejax.training import checkpoints

_GIN = """
from __gin__ import dynamic_registration
from mergejax.nn import lm
from mergejax.cli import grow_forest

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


class Killed(BaseException):
  """What nothing catches."""


class GrowForestTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(environments.one_device())
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    small_corpora.write(cls.folder / 'text', small_corpora.DOMAINS)
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
      ("merge='fisher' needs a fisher of every expert",
       '--gin.grow_forest.Settings.merge=fisher'),
      ('seed_steps must be a whole number of 0 or more, not -1',
       '--gin.SEED_STEPS=-1'),
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

  def test_settings(self):
    with self.assertRaisesRegex(mj.ConfigError, 'generation must be'):
      grow_forest.Settings(
        module=None, optimizer=None, model_dir='x', batch_size=1, length=1,
        max_train_bytes=None, seed=0, seed_steps=1, branch_steps=1,
        branch_from='seed', generation=0,
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
