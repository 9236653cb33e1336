# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a stranger adds in one file each, used through Python and commands."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import environments
import jax
import numpy as np
import optax
import yaml

import gin
import mergejax as mj
from mergejax import partition
from mergejax.cli import main
from mergejax.core import tree

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import toy_method  # noqa: E402  (what a stranger has on their path)
import toy_model  # noqa: E402
import toy_objective  # noqa: E402
import toy_statistic  # noqa: E402
import toy_transform  # noqa: E402


def mergejax(*arguments: str) -> str:
  """Runs a command as a stranger would, and gives back what it printed."""
  paths = os.pathsep.join([str(HERE), os.environ.get('PYTHONPATH', '')])
  done = subprocess.run(
    [sys.executable, '-m', 'mergejax', *arguments],
    capture_output=True,
    text=True,
    check=False,
    env=environments.of(PYTHONPATH=paths),
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def batch_of(seed: int, rows: int = 16) -> dict[str, np.ndarray]:
  """Points and which of three corners they are next to."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 3, rows).astype(np.int32)
  x = rng.normal(size=(rows, 4)) + 2 * np.eye(4)[labels]
  return {'x': x.astype(np.float32), 'labels': labels}


class ModelTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.module = toy_model.ToyMoE(toy_model.ToyConfig())
    self.family = mj.models.family_of(self.module)

  def saved(self, name, seed):
    """A model of the family on disk, and its parameters."""
    params = jax.device_get(self.family.init(jax.random.key(seed)))
    config = mj.models.describe(self.module)
    mj.save_checkpoint(self.folder / name, params, config=config)
    return str(self.folder / name), params

  def test_trains_on_every_device_with_its_losses_and_metrics(self):
    rates = {}
    for name, mesh in (
      ('one', partition.make_mesh(devices=jax.devices()[:1])),
      ('eight', partition.make_mesh(data=4, expert=2)),
    ):
      trainer = mj.training.Trainer(
        self.module,
        optax.sgd(0.1),
        mesh=mesh,
        objective=toy_objective.focal(),
        transforms=[toy_transform.leash(0.05), mj.training.ema(0.5)],
        callbacks=[mj.training.callbacks.jsonl()],
      )
      folder = self.folder / name
      batches = [batch_of(seed) for seed in range(3)]
      state = trainer.fit(batches, steps=3, directory=folder, log_every=1)
      self.assertIn('ema', state.extras)
      rows = (folder / 'metrics.jsonl').read_text().splitlines()
      rates[name] = [json.loads(row) for row in rows]
    for row, other in zip(rates['one'], rates['eight'], strict=True):
      self.assertGreater(row['load_balance'], 0)
      self.assertBetween(row['busiest_expert'], 0.5, 1)
      for metric, value in row.items():
        np.testing.assert_allclose(other[metric], value, rtol=1e-5)
    # The leash held: the last steps went further than it allows.
    self.assertGreater(rates['one'][-1]['distance'], 0.05)

  def test_checkpoints_know_their_family_and_axes(self):
    path, params = self.saved('toy', 0)
    module, loaded = mj.load_model(path)
    self.assertEqual(module, self.module)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    specs = mj.open_checkpoint(path).specs()
    self.assertEqual(specs['wi'].axes, ('expert', 'inputs', 'outputs'))
    self.assertIn('wi', mergejax('inspect', path, '--import', 'toy_model'))

  def test_a_method_merges_in_memory_and_by_a_recipe(self):
    (a, first), (b, second) = self.saved('a', 1), self.saved('b', 2)
    recipe = self.folder / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({
      'merge_method': 'toy_method:even_norms',
      'models': [
        {'model': a, 'parameters': {'weight': 2.0}}, {'model': b},
      ],
      'parameters': {'power': 0.5},
    }))  # fmt: skip
    out = self.folder / 'out'
    mergejax('merge', str(recipe), str(out), '--import', 'toy_model')
    here = mj.merge(
      [mj.open_checkpoint(a), mj.open_checkpoint(b)],
      toy_method.even_norms(power=0.5),
      weights=[2.0, 1.0],
    )
    there = mj.open_checkpoint(out).read()
    for path, leaf in tree.flatten(there).items():
      np.testing.assert_array_equal(leaf, tree.flatten(here)[path], path)
      leaves = [np.float64(tree.flatten(p)[path]) for p in (first, second)]
      if leaf.ndim < 2:
        continue  # biases begin at zero, which has no length
      stack = range(len(leaf)) if path == 'wi' else [...]
      for i in stack:
        norms = [np.linalg.norm(x[i]) for x in leaves]
        scaled = [x[i] * (max(norms) / n) ** 0.5 for x, n in zip(leaves, norms)]
        expected = (2 * scaled[0] + scaled[1]) / 3
        np.testing.assert_allclose(leaf[i], expected, rtol=1e-5, atol=1e-7)

  def test_a_statistic_of_its_own_shape(self):
    (a, first), (b, second) = self.saved('a', 1), self.saved('b', 2)
    found, sizes = [], []
    for name, params, seed in (('a', first, 3), ('b', second, 4)):
      batches = [batch_of(seed), batch_of(seed + 10)]
      means = mj.stats.collect(
        toy_statistic.input_size(), self.module, params, batches,
        mesh=partition.make_mesh(devices=jax.devices()[:4]),
      )  # fmt: skip
      means.save(self.folder / f'{name}_stats')
      found.append(mj.stats.load(self.folder / f'{name}_stats'))
      x = np.concatenate([batch['x'] for batch in batches])
      sizes.append(np.abs(x.astype(np.float64)).mean(axis=0))
      size = found[-1]['router/kernel']['input_size']
      np.testing.assert_allclose(size, sizes[-1], rtol=1e-5)
    recipe = {
      'merge_method': 'toy_statistic:by_input_size',
      'models': [
        {'model': a, 'stats': str(self.folder / 'a_stats')},
        {'model': b, 'stats': str(self.folder / 'b_stats')},
      ],
    }
    recipe['stats'] = [one.pop('stats') for one in recipe['models']]
    mj.execute(mj.plan(recipe), self.folder / 'out')
    there = mj.open_checkpoint(self.folder / 'out').read()
    here = mj.merge(
      [mj.open_checkpoint(a), mj.open_checkpoint(b)],
      toy_statistic.by_input_size(),
      stats=found,
    )
    jax.tree.map(np.testing.assert_array_equal, here, there)
    kernels = [np.float64(p['router']['kernel']) for p in (first, second)]
    share = sizes[0] / (sizes[0] + sizes[1])
    expected = share[:, None] * kernels[0] + (1 - share[:, None]) * kernels[1]
    np.testing.assert_allclose(
      there['router']['kernel'], expected, rtol=1e-5, atol=1e-7
    )


class TaskTest(absltest.TestCase):
  def run_here(self, *arguments):
    """As `mergejax`, without a process that imports TensorFlow anew."""
    self.assertEqual(main.main([str(a) for a in arguments]), 0)

  def test_gin_trains_and_a_suite_scores(self):
    self.addCleanup(gin.clear_config)
    self.enter_context(environments.one_device())
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'toy.gin').write_text(f"""
from __gin__ import dynamic_registration
import toy_task
import toy_objective
import toy_transform
from mergejax.cli import train
from mergejax.nn import t5
from mergejax.training import optim
include 'models/t5_1_1_tiny.gin'

t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
train.run.job = @train.train_model
train.train_model:
  module = %MODEL
  optimizer = @optim.adafactor
  mixture_or_task = 'toy_even'
  model_dir = '{folder / 'run'}'
  steps = 2
  batch_size = 8
  lengths = {{'inputs': 16, 'targets': 8}}
  seed = 0
  save_every = 1
  log_every = 1
  objective = @toy_objective.focal()
  transforms = [@toy_transform.leash()]
toy_objective.focal.gamma = 1.0
toy_transform.leash.radius = 0.1
optim.adafactor.learning_rate = 0.1
""")
    self.run_here('train', f'--gin_file={folder / "toy.gin"}')
    (metrics,) = (folder / 'run').rglob('metrics.jsonl')
    rows = [json.loads(row) for row in metrics.read_text().splitlines()]
    self.assertLen(rows, 2)
    self.assertGreater(rows[-1]['distance'], 0.1)
    suite = folder / 'suite.yaml'
    suite.write_text(yaml.safe_dump({
      'mixture': 'toy_even', 'import': 'toy_task', 'metric': 'seqio',
      'lengths': {'inputs': 16, 'targets': 8}, 'batch_size': 8,
    }))  # fmt: skip
    model = str(folder / 'run' / 'model')
    table = folder / 'table.json'
    self.run_here('evaluate', model, '--suite', suite, '--json', table)
    (scores,) = json.loads(table.read_text())['raw'].values()
    self.assertEqual(scores['tasks']['toy_even/even']['value'], 0.5)
    self.assertIn('toy_even/said_even', scores['tasks'])


if __name__ == '__main__':
  absltest.main()
