# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run goes on with its layers stored in another way, moments included."""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import tiers

from mergejax import adapters
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.training import layer_moments
from mergejax.training import optim
from mergejax.training import trainer as trainer_lib

FOLDER = pathlib.Path(__file__).parents[1] / 'testdata/t5x_tiny_complete'
KEY = jax.random.key(0)
RULES = optim.standard_logical_factor_rules()


def module(**changes):
  sizes = dict(
    vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
    num_encoder_layers=2, num_decoder_layers=3, dropout_rate=0.0,
  )  # fmt: skip
  return t5.Transformer(t5.T5Config(**sizes | changes))


@functools.cache
def trainer(optimizer, **changes):
  return trainer_lib.Trainer(module(**changes), optimizer, mesh=one_device())


def one_device():
  return partition.make_mesh(devices=jax.devices()[:1])


def decoder(scanned):
  """A model that compiles in a moment."""
  return lm.LanguageModel(
    lm.LMConfig(
      vocab_size=32, emb_dim=16, num_heads=1, head_dim=16, mlp_dim=24,
      num_layers=2, scan_layers=scanned,
    )
  )  # fmt: skip


def form(one):
  """What `restack` is told of a trainer."""
  return one.specs, optim.of_run(one.optimizer, 9, one._stacks())


def random_moments(one, seed=0):
  """A state of its optimizer with no two numbers alike, after 7 steps."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    if not np.issubdtype(x.dtype, np.floating):
      return np.full(x.shape, 7, x.dtype)
    unused = x.shape[-1:] == (1,)
    return (rng.uniform(size=x.shape) * (not unused)).astype(x.dtype)

  specs, optimizer = form(one)
  zeros = tree.unflatten(
    {path: np.zeros(spec.shape, np.float32) for path, spec in specs.items()}
  )
  return jax.tree.map(leaf, jax.eval_shape(optimizer.init, zeros))


OPTIMIZERS = {
  'adamw': optim.adamw(0.01),
  'adafactor': optim.adafactor(0.1),
  'factored': optim.adafactor(
    0.1, min_dim_size_to_factor=8, momentum=0.9, max_gradient_norm=1.0
  ),
  'ruled': optim.adafactor(
    0.1, min_dim_size_to_factor=8, logical_factor_rules=RULES, momentum=0.9
  ),
}


class FormsTest(parameterized.TestCase):
  @parameterized.product(
    name=list(OPTIMIZERS), axes=[(None, 1), (1, None), (0, 1)]
  )
  def test_there_and_back_changes_no_bit(self, name, axes):
    one, other = [
      trainer(
        OPTIMIZERS[name],
        scan_layers=axis is not None,
        param_scan_axis=axis if axis is not None else 1,
      )
      for axis in axes
    ]
    moments = random_moments(one)
    like = random_moments(other, seed=1)
    found = layer_moments.restack(moments, form(one), like, form(other))
    jax.tree.map(lambda a, b: self.assertEqual(a.shape, b.shape), found, like)
    back = layer_moments.restack(found, form(other), moments, form(one))
    jax.tree.map(np.testing.assert_array_equal, back, moments)

  def test_each_layer_keeps_its_own(self):
    apart, scanned = [
      trainer(OPTIMIZERS['factored'], scan_layers=scan)
      for scan in (False, True)
    ]
    moments = random_moments(apart)
    found = layer_moments.restack(
      moments, form(apart), random_moments(scanned), form(scanned)
    )
    ours, theirs = tree.flatten(moments), tree.flatten(found)
    for layer in range(3):
      for kind in ('v_row', 'v_col'):
        (stack,) = [
          leaf for place, leaf in theirs.items()
          if 'decoder/decoder/mlp/wo/kernel' in place
          and place.endswith(kind)
        ]  # fmt: skip
        (own,) = [
          leaf for place, leaf in ours.items()
          if place.endswith(f'{kind}/decoder/layers_{layer}/mlp/wo/kernel')
        ]  # fmt: skip
        self.assertGreater(own.size, 1)
        np.testing.assert_array_equal(stack[layer], own)


@tiers.slow('test_losses_.*0')
class GoesOnTest(parameterized.TestCase):
  @parameterized.parameters(('adamw', False), ('ruled', True))
  def test_losses_are_those_of_a_run_that_was_not_changed(self, name, scanned):
    if name == 'adamw':  # optax divides by a power of the whole-number count
      self.enter_context(jax.numpy_dtype_promotion('standard'))
    self.check(
      trainer_lib.Trainer(decoder(scan), OPTIMIZERS[name], mesh=one_device())
      for scan in (scanned, not scanned)
    )

  @parameterized.parameters(False, True)
  def test_moments_of_an_adapter(self, scanned):
    lora = adapters.lora(rank=2)
    self.check(
      trainer_lib.Trainer(
        adapters.adapt(decoder(scan), lora), OPTIMIZERS['factored'],
        mesh=one_device(),
      )
      for scan in (scanned, not scanned)
    )  # fmt: skip

  def check(self, trainers):
    first, second = trainers
    folder = pathlib.Path(self.create_tempdir().full_path)
    batches = list(self.batches())
    first.fit(batches, steps=3, key=KEY, directory=folder, save_every=3)
    store = checkpoint.open_state(folder / 'checkpoints/3')
    ends = []
    for one in (first, second):
      params = tree.unflatten(one.family.arranged(self.parameters(store)))
      state = one.begin(6, params, KEY, store)
      self.assertEqual(int(state.step), 3)
      ends.append(one.fit(batches[3:], steps=6, key=KEY, state=state))
    ours = second.family.arranged(tree.flatten(jax.device_get(ends[0].params)))
    for path, leaf in tree.flatten(ends[1].params).items():
      np.testing.assert_allclose(leaf, ours[path], rtol=1e-4, atol=1e-5)

  def batches(self):
    rng = np.random.default_rng(0)
    for _ in range(6):
      targets = rng.integers(3, 32, (4, 6)).astype(np.int32)
      yield {
        'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
        'decoder_target_tokens': targets,
      }

  def parameters(self, store):
    names = [path for path in store.specs() if path.startswith('params/')]
    leaves = tree.flatten(store.read(names))
    return {path.removeprefix('params/'): leaf for path, leaf in leaves.items()}


class T5XTest(absltest.TestCase):
  def test_its_layers_one_by_one_go_on_scanned(self):
    place = FOLDER / 'orbax/checkpoint_3'
    store = checkpoint.open_state(place)
    one = trainer(
      optim.adafactor(0.1), scan_layers=True, vocab_size=64, emb_dim=8,
      head_dim=4, mlp_dim=16, num_decoder_layers=2,
    )  # fmt: skip
    params = one.family.arranged(
      tree.flatten(checkpoint.open_checkpoint(place).read())
    )
    state = one.begin(9, tree.unflatten(params), KEY, store)
    self.assertEqual(int(state.step), 3)
    theirs = tree.flatten(store.read())
    found = tree.flatten(state.opt_state)
    kernel = 'decoder/decoder/mlp/wo/kernel'
    self.assertEqual(found[f'stacked/{kernel}/0/count'].tolist(), [3, 3])
    for i in range(2):
      np.testing.assert_array_equal(
        found[f'stacked/{kernel}/0/v'][i],
        theirs[f'state/param_states/decoder/layers_{i}/mlp/wo/kernel/v'],
      )


class MistakesTest(absltest.TestCase):
  def test_rules_that_factor_a_stack_alone(self):
    optimizer = optim.adafactor(0.1, logical_factor_rules=RULES)
    apart, scanned = [
      trainer(optimizer, scan_layers=scan) for scan in (False, True)
    ]
    with self.assertRaisesRegex(
      errors.CheckpointError, r'v_row.*\[16\] there, \[1\] here'
    ):
      layer_moments.restack(
        random_moments(scanned), form(scanned), random_moments(apart),
        form(apart),
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
