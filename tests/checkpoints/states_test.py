# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Of a training state, parameters and running averages are opened, no more."""

import pathlib
from typing import Any

from absl.testing import absltest
from absl.testing import parameterized
import flax.serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import mergejax as mj
from mergejax.checkpoints import states
from mergejax.core import tree as tree_lib

PARAMS = {'dense': {'kernel': 1, 'bias': 2}}
SHOWN = ['dense/bias', 'dense/kernel']
STATS = {'bn': {'mean': 3, 'var': 4}}
WITH_STATS = ['batch_stats/bn/mean', 'batch_stats/bn/var', *SHOWN]
ADAM = [{'count': 5, 'mu': PARAMS, 'nu': PARAMS}, None]

# A state as some trainer writes it, and what of it are parameters.
STATES = {
  'flax': ({'params': PARAMS, 'opt_state': ADAM, 'step': 0}, SHOWN),
  'flax_batch_norm': (
    {'params': PARAMS, 'opt_state': ADAM, 'batch_stats': STATS}, WITH_STATS,
  ),
  'big_vision': ({'params': PARAMS, 'opt': ADAM[0]}, SHOWN),
  'model': ({'model': PARAMS, 'optimizer': {'mu': PARAMS}, 'step': 0}, SHOWN),
  'nnx': ({'model': PARAMS, 'opt_state': {}, 'step': 0}, SHOWN),
  't5x': (
    {'target': PARAMS, 'state': {'step': 0, 'param_states': PARAMS},
     'flax_mutables': {'batch_stats': STATS, 'other': 1}}, WITH_STATS,
  ),
  't5x_sgd': ({'target': PARAMS, 'state': {'step': 0}}, SHOWN),
  'flax_optim': (
    {'optimizer': {'target': PARAMS, 'state': {'param_states': PARAMS}}}, SHOWN,
  ),
  'wrapped': ({'train_state': {'params': PARAMS, 'opt_state': ADAM}}, SHOWN),
  'wrapped_twice': (
    {'state': {'train_state': {'params': PARAMS, 'opt': ADAM}}, 'seed': 1},
    SHOWN,
  ),
  'model_state': (
    {'params': PARAMS, 'optimizer_state': ADAM,
     'model_state': {'batch_stats': STATS}}, WITH_STATS,
  ),
  'averages_of_weights': (
    {'params': PARAMS, 'ema_params': PARAMS, 'opt_state': ADAM}, SHOWN,
  ),
  'haiku': (
    {'params': PARAMS, 'state': {'bn': 1}, 'opt_state': ADAM},
    [*SHOWN, 'state/bn'],
  ),
}  # fmt: skip


class StatesTest(parameterized.TestCase):
  @parameterized.parameters(*STATES)
  def test_parameters_of(self, name):
    tree, expected = STATES[name]
    found = states.parameters(tree, name)
    self.assertCountEqual(found.paths, expected)
    leaves = tree_lib.flatten(tree)
    wanted = tree_lib.flatten({**PARAMS, 'batch_stats': STATS})
    for path, stored in found.paths.items():
      if path in wanted:
        self.assertEqual(leaves[stored], wanted[path], path)
    self.assertNotEmpty(found.left_out)

  def test_what_is_left_out_is_named(self):
    tree, _ = STATES['averages_of_weights']
    found = states.parameters({**tree, 'step': 3}, 'x')
    self.assertEqual(found.left_out, ['ema_params', 'opt_state', 'step'])
    found = states.parameters(STATES['t5x'][0], 'x')
    self.assertEqual(found.left_out, ['flax_mutables/other', 'state'])

  @parameterized.parameters(
    {'params': PARAMS, 'batch_stats': STATS},
    {'params': PARAMS, 'state': {'bn': 1}},  # Haiku's variables
    {'model': PARAMS, 'opt': {'decoder': PARAMS}},  # a model called OPT
    {'state': {'A': 1, 'B': 2}, 'target': {'w': 1}, 'model': {'mu': 1}},
    {'mu': {'kernel': 1}, 'optimizer': {'kernel': 2}},
    PARAMS,
  )
  def test_trees_that_are_no_states_are_shown_whole(self, **tree):
    if 'target' in tree:
      del tree['target']
    found = states.parameters(tree, 'x')
    self.assertEqual(found.left_out, [])
    leaves = tree_lib.flatten(tree)
    self.assertEqual(dict(found.paths), {path: path for path in leaves})

  def test_averages_without_parameters_are_refused(self):
    with self.assertRaisesRegex(mj.UserError, "'optim', .*step, weights"):
      states.parameters({'weights': PARAMS, 'optim': ADAM, 'step': 0}, 'x')


class BatchNormState(train_state.TrainState):
  batch_stats: Any = None


def trained(value):
  """A state whose numbers tell where they come from."""
  params = {'dense': {'kernel': jnp.full((2, 3), value)}}
  state = BatchNormState.create(
    apply_fn=None, params=params, tx=optax.adam(1e-3),
    batch_stats={'bn': {'mean': jnp.full(3, 10 * value)}},
  )  # fmt: skip
  moments = jax.tree.map(lambda leaf: leaf + 77, state.opt_state)
  return state.replace(opt_state=moments)


class OnDiskTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def check(self, paths):
    merged = tree_lib.flatten(mj.merge(paths, 'linear'))
    self.assertCountEqual(merged, ['dense/kernel', 'batch_stats/bn/mean'])
    np.testing.assert_array_equal(merged['dense/kernel'], np.full((2, 3), 2.0))
    np.testing.assert_array_equal(merged['batch_stats/bn/mean'], [20.0] * 3)

  def test_flax_states_merge_with_their_batch_statistics(self):
    paths = [self.folder / 'a', self.folder / 'b']
    for path, value in zip(paths, (1.0, 3.0)):
      ocp.PyTreeCheckpointer().save(path, trained(value))
    self.check(paths)
    remarks = mj.plan(
      {
        'merge_method': 'linear',
        'models': [{'model': str(path)} for path in paths],
      }
    ).describe()
    self.assertIn('a, this is not merged: opt_state, step', remarks)

  @parameterized.parameters('.npz', '.safetensors')
  def test_states_flattened_into_one_file(self, suffix):
    paths = [self.folder / f'a{suffix}', self.folder / f'b{suffix}']
    for path, value in zip(paths, (1.0, 3.0)):
      state = flax.serialization.to_state_dict(trained(value))
      mj.save_checkpoint(path, state)
    self.check(paths)

  def test_items_of_a_manager(self):
    paths = [self.folder / 'a', self.folder / 'b']
    for path, value in zip(paths, (1.0, 3.0)):
      state = trained(value)
      options = ocp.CheckpointManagerOptions(create=True, step_prefix='step')
      with ocp.CheckpointManager(path, options=options) as manager:
        items = dict(
          params=state.params, batch_stats=state.batch_stats,
          opt_state=state.opt_state,
        )  # fmt: skip
        manager.save(3, args=ocp.args.Composite(**{
          name: ocp.args.StandardSave(item) for name, item in items.items()
        }))  # fmt: skip
    self.check(paths)
    store = mj.open_checkpoint(paths[0])
    self.assertEqual(store.provenance['left_out'], ['opt_state'])
    self.assertEqual(
      {f.parts[-2] for f in store.files()} & {'opt_state'}, set()
    )

  def test_an_item_of_another_name(self):
    tree = {'params': {'w': jnp.ones(2)}, 'opt': {'mu': {'w': jnp.zeros(2)}}}
    mj.save_checkpoint(self.folder / 'run' / '7' / 'learner', tree)
    store = mj.open_checkpoint(self.folder / 'run')
    self.assertEqual(list(store.specs()), ['w'])
    np.testing.assert_array_equal(store.read()['w'], [1, 1])


if __name__ == '__main__':
  absltest.main()
