# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints with the optimizer's state, in and out, bit for bit."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import environments
import flax.serialization
import goldens
import jax
import numpy as np
import optax
import pytest

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import t5
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import t5x_slots
from mergejax.training import t5x_state
from mergejax.training import trainer as trainer_lib

FOLDER = goldens.FOLDER / 't5x_tiny_complete'
SIZES = dict(
  vocab_size=64, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
  num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip


def files(folder):
  return sorted(
    str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file()
  )


def msgpack(folder):
  data = (folder / 'checkpoint').read_bytes()
  return flax.serialization.msgpack_restore(data)


def random_state(optimizer, params, seed=0):
  """A state as after some steps: no two numbers alike."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    if not np.issubdtype(x.dtype, np.floating):
      return np.full(x.shape, 7, x.dtype)
    used = x.shape[-1:] != (1,)
    return rng.uniform(size=x.shape).astype(x.dtype) * used

  return state_lib.TrainState(
    step=np.int32(7),
    params=jax.tree.map(leaf, params),
    opt_state=jax.tree.map(leaf, jax.eval_shape(optimizer.init, params)),
    key=np.zeros(2, np.uint32),
  )


def without(names, gone):
  return [size for axis, size in names.items() if axis not in gone]


class GoldenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(environments.one_device())

  @parameterized.parameters('t5x_legacy', 'orbax')
  def test_there_and_back(self, name):
    source = FOLDER / name / 'checkpoint_3'
    trainer = trainer_lib.Trainer(
      t5.Transformer(t5.T5Config(**SIZES)), optim.adafactor(0.01)
    )
    store = checkpoint.open_state(source)
    params = checkpoint.open_checkpoint(source).read()
    state = trainer.begin(10, params, jax.random.key(0), store)
    self.assertEqual(int(state.step), 3)
    leaves = tree.flatten(state.opt_state)
    counts = [leaf for path, leaf in leaves.items() if path.endswith('count')]
    self.assertNotEmpty(counts)
    for count in counts:
      self.assertEqual(int(count), 3)
    # optax's tree of second moments, with T5X's numbers.
    theirs = tree.flatten(checkpoint.open_state(FOLDER / 'orbax').read())
    for path in tree.flatten(params):
      np.testing.assert_array_equal(
        leaves[f'0/v/{path}'], theirs[f'state/param_states/{path}/v']
      )
    # What is written is what T5X wrote, to the last byte.
    legacy = FOLDER / 't5x_legacy' / 'checkpoint_3'
    out = t5x_state.save(
      self.create_tempdir().full_path, trainer.family, trainer.optimizer, state
    )
    self.assertEqual(out.name, 'checkpoint_3')
    self.assertEqual(files(out), files(legacy))
    for file in files(legacy):
      if file != 'checkpoint':
        self.assertEqual(
          (out / file).read_bytes(), (legacy / file).read_bytes()
        )
    jax.tree.map(
      self.assertEqual, *map(jax.tree.structure, map(msgpack, (out, legacy)))
    )
    jax.tree.map(np.testing.assert_array_equal, msgpack(out), msgpack(legacy))

  def test_training_goes_on_at_t5x_s_step(self):
    trainer = trainer_lib.Trainer(
      t5.Transformer(t5.T5Config(**SIZES)), optim.adafactor(0.01)
    )
    source = FOLDER / 't5x_legacy'
    store = checkpoint.open_state(source)
    params = checkpoint.open_checkpoint(source).read()
    make = lambda steps: trainer.begin(steps, params, jax.random.key(0), store)
    with self.assertRaisesRegex(errors.UserError, 'of step 3.*reach step 3'):
      make(3)
    batch = trainer.family.example_batch(8)
    state = trainer.fit([batch] * 2, steps=4, state=make(4))
    self.assertEqual(int(state.step), 4)
    # Its second moments weigh: 1 - (3 + 1)^-0.8 of them stay.
    v = lambda s: tree.flatten(s.opt_state)['0/v/encoder/encoder_norm/scale']
    self.assertTrue((np.asarray(v(state)) > 0.6 * v(make(4))).all())


class FormsTest(parameterized.TestCase):
  """Scanned layers, factored moments, momentum: shapes are T5X's."""

  @parameterized.parameters((0, None), (1, 0.9))
  def test_scanned(self, scan_axis, momentum):
    self.check_scanned(scan_axis, momentum)

  @parameterized.parameters((1, None), (0, 0.9))
  @pytest.mark.slow
  def test_scanned_along_the_other_axis(self, scan_axis, momentum):
    self.check_scanned(scan_axis, momentum)

  def check_scanned(self, scan_axis, momentum):
    family = models.family_of(
      t5.Transformer(
        t5.T5Config(
          scan_layers=True, param_scan_axis=scan_axis, relative_per_layer=True,
          **SIZES,
        )
      )
    )  # fmt: skip
    specs = family.specs()
    axes = {path: spec.axes for path, spec in specs.items()}
    optimizer = optim.adafactor(
      0.01, momentum=momentum, min_dim_size_to_factor=8,
      logical_factor_rules=optim.standard_logical_factor_rules(),
    ).of_model({p: names for p, names in axes.items() if 'layers' in names})  # fmt: skip
    shapes = {
      path: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
      for path, spec in specs.items()
    }
    state = random_state(optimizer, tree.unflatten(shapes))
    moments = t5x_state.to_t5x(state.opt_state, specs, optimizer)
    rows = {'embed'}
    columns = {'vocab', 'mlp', 'heads', 'joined_kv'}
    for path, spec in specs.items():
      names = dict(zip(spec.axes, spec.shape))
      factored = rows & {*names} and columns & {*names}
      if factored and 'layers' not in names:  # sizes decide, as T5X does
        small, large = np.sort(spec.shape)
        expected = ([small], [large], [1])
      elif factored:
        expected = (without(names, columns), without(names, rows), [1])
      else:
        expected = ([1], [1], list(spec.shape))
      got = [
        list(moments[f'{path}/{n}'].shape) for n in ('v_row', 'v_col', 'v')
      ]
      self.assertEqual(got, list(expected), path)
      m = list(moments[f'{path}/m'].shape)
      self.assertEqual(m, [1] if momentum is None else list(spec.shape))
    again = t5x_state.from_t5x(moments, 7, state.opt_state, specs, optimizer)
    jax.tree.map(np.testing.assert_array_equal, again, state.opt_state)
    # And through the disk.
    out = t5x_state.save(
      self.create_tempdir().full_path, family, optimizer, state
    )
    stored = tree.flatten(checkpoint.open_state(out).read())
    self.assertEqual(int(stored['state/step']), 7)
    for path, leaf in moments.items():
      np.testing.assert_array_equal(stored[f'state/param_states/{path}'], leaf)

  def test_a_step_of_t5x_with_scanned_layers(self):
    # `before` was restored, moved by `grads` and saved as `after` by T5X's own
    # checkpointer and Adafactor (0.05, min_dim_size_to_factor=8, beta1=0.9,
    # weight_decay_rate_lr_exponent=2, standard factor rules); slots of shape
    # [1] are left out.
    arrays = goldens.load('t5x_scanned_state')
    moments, params = (
      {
        name.removeprefix(prefix): leaf
        for name, leaf in arrays.items()
        if name.startswith(prefix)
      }
      for prefix in ('before/state/param_states/', 'before/target/')
    )
    specs = models.family_of(
      t5.Transformer(
        t5.T5Config(scan_layers=True, relative_per_layer=True, **SIZES)
      )
    ).specs()
    for path in specs:
      for slot in t5x_slots.NAMES:
        moments.setdefault(f'{path}/{slot}', np.zeros((1,), np.float32))
    optimizer = optim.adafactor(
      0.05, min_dim_size_to_factor=8, momentum=0.9,
      weight_decay_rate_lr_exponent=2.0,
      logical_factor_rules=optim.standard_logical_factor_rules(),
    ).of_model({p: s.axes for p, s in specs.items() if 'layers' in s.axes})  # fmt: skip
    like = jax.eval_shape(optimizer.init, params)
    state = t5x_state.from_t5x(moments, 3, like, specs, optimizer)
    back = t5x_state.to_t5x(state, specs, optimizer)
    jax.tree.map(np.testing.assert_array_equal, back, moments)
    grads = {path: arrays[f'grads/{path}'] for path in specs}
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    found = {
      f'state/param_states/{path}': leaf
      for path, leaf in t5x_state.to_t5x(state, specs, optimizer).items()
      if leaf.shape != (1,)
    }
    for path, leaf in optax.apply_updates(params, updates).items():
      found[f'target/{path}'] = leaf
    wanted = {n[6:]: leaf for n, leaf in arrays.items() if n[:6] == 'after/'}
    self.assertEqual(int(wanted.pop('state/step')), 4)
    self.assertCountEqual(found, wanted)
    for name, leaf in wanted.items():
      np.testing.assert_allclose(
        found[name], leaf, rtol=2e-5, atol=1e-6, err_msg=name
      )

  def test_which_number_goes_where(self):
    # A kernel [embed, layers, mlp], taller than wide: optax's rows are the
    # shorter side, T5X's are `embed`.
    axes = {'wi': ('embed', 'layers', 'mlp')}
    optimizer = optim.adafactor(
      0.1, axes=[*axes.items()],
      logical_factor_rules=optim.standard_logical_factor_rules(),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    grad = rng.normal(size=(6, 3, 4)).astype(np.float32)
    params = {'wi': np.ones((6, 3, 4), np.float32)}
    _, state = optimizer.update({'wi': grad}, optimizer.init(params), params)
    found = t5x_state.to_t5x(state, tree.specs(params), optimizer)
    np.testing.assert_allclose(
      found['wi/v_row'], np.mean(grad**2, axis=2), rtol=1e-5
    )
    np.testing.assert_allclose(
      found['wi/v_col'], np.mean(grad**2, axis=0), rtol=1e-5
    )
    # Layers on the last axis lie first in ours.
    axes = [('wi', ('embed', 'mlp', 'layers'))]
    optimizer = optim.adafactor(0.1, axes=axes, factored=False)
    _, state = optimizer.update({'wi': grad}, optimizer.init(params), params)
    found = t5x_state.to_t5x(state, tree.specs(params), optimizer)
    np.testing.assert_allclose(found['wi/v'], grad**2, rtol=1e-5)
    again = t5x_state.from_t5x(found, 1, state, tree.specs(params), optimizer)
    jax.tree.map(np.testing.assert_array_equal, again, state)

  def test_mistakes(self):
    params = {'wi': np.ones((3, 8, 8), np.float32), 'b': np.ones(4, np.float32)}
    axes = [('wi', ('layers', 'embed', 'mlp'))]
    specs = tree.specs(params)

    def exported(optimizer):
      return t5x_state.to_t5x(optimizer.init(params), specs, optimizer)

    with self.assertRaisesRegex(errors.UserError, 'standard_logical_factor'):
      exported(optim.adafactor(0.1, axes=axes))
    with self.assertRaisesRegex(errors.UserError, "is adamw.*restore='params'"):
      exported(optim.adamw(0.1))
    factored = optim.adafactor(
      0.1, axes=axes, min_dim_size_to_factor=4,
      logical_factor_rules=optim.standard_logical_factor_rules(),
    )  # fmt: skip
    moments = exported(factored)
    with_momentum = optim.adafactor(
      0.1, axes=axes, momentum=0.9,
      logical_factor_rules=optim.standard_logical_factor_rules(),
    )  # fmt: skip
    for optimizer, given, message in (
      (with_momentum, moments, r'b/m: \[1\] there, \[4\] here'),
      (factored, {'b/v': moments['b/v']}, 'wi/v_row: nothing there'),
      (factored, {**moments, 'c/v': np.ones(3)}, r'c/v: \[3\] there, not kept'),
    ):
      like = optimizer.init(params)
      with self.assertRaisesRegex(errors.UserError, message):
        t5x_state.from_t5x(given, 0, like, specs, optimizer)
    with self.assertRaisesRegex(
      errors.UserError, 'no checkpoint of a training'
    ):
      path = pathlib.Path(self.create_tempdir().full_path) / 'w.npz'
      checkpoint.save_checkpoint(path, params)
      checkpoint.open_state(path)


if __name__ == '__main__':
  absltest.main()
