# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax convert --state`: whole training states, there and back."""

import contextlib
import io
import json
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import numpy as np

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import main as main_lib
from mergejax.core import tree
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import t5x_state
from mergejax.training import trainer as trainer_lib

SOURCE = goldens.FOLDER / 't5x_tiny_complete'
CONFIG = dict(
  model_type='t5x', vocab_size=64, emb_dim=8, num_heads=2, head_dim=4,
  mlp_dim=16, num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip


def counting(step):
  return 0.1 / (step + 1)


def random_state(family, optimizer, seed=0):
  """A state after 7 steps, no two numbers alike."""
  rng = np.random.default_rng(seed)

  def leaf(x):
    if not np.issubdtype(x.dtype, np.floating):
      return np.full(x.shape, 7, x.dtype)
    unused = x.shape[-1:] == (1,)
    return rng.uniform(size=x.shape).astype(x.dtype) * (not unused)

  shapes = tree.unflatten({
    path: jax.ShapeDtypeStruct(spec.shape, np.float32)
    for path, spec in family.specs().items()
  })  # fmt: skip
  stacks = {
    path: spec.axes
    for path, spec in family.specs().items()
    if 'layers' in (spec.axes or ())
  }
  optimizer = optim.of_run(optimizer, 9, stacks)
  moments = jax.eval_shape(optimizer.init, shapes)
  state = state_lib.TrainState(
    np.int32(7), jax.tree.map(leaf, shapes), jax.tree.map(leaf, moments),
    jax.random.key(5),
  )  # fmt: skip
  return optimizer, state


def leaves(path):
  return tree.flatten(checkpoint.open_state(path).read())


class ConvertStateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def convert(self, source, name, *flags, code=0):
    """`(the folder that was made, what was said)`."""
    out, told = self.folder / name, io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
      found = main_lib.main([
        'convert', str(source), str(out), '--state', *flags
      ])  # fmt: skip
    self.assertEqual(found, code, told.getvalue())
    if code:
      self.assertFalse(out.exists())
    return out, told.getvalue()

  def of_t5x(self, kind='t5x_legacy', **changes):
    """T5X's own checkpoint of step 3, with a config.json beside it."""
    shutil.copytree(SOURCE / kind, self.folder / kind)
    config = self.folder / kind / checkpoint.CONFIG
    config.write_text(json.dumps({**CONFIG, **changes}))
    return self.folder / kind

  def check_same(self, found, expected):
    found, expected = leaves(found), leaves(expected)
    self.assertEqual(found.keys(), expected.keys())
    for name, leaf in expected.items():
      self.assertEqual(found[name].dtype, leaf.dtype, name)
      np.testing.assert_array_equal(found[name], leaf, name)

  @parameterized.parameters('t5x_legacy', 'orbax')
  def test_from_t5x_to_ours_and_back(self, kind):
    ours, said = self.convert(self.of_t5x(kind), 'ours')
    self.assertIn('step 3, with the state of adafactor', said)
    back, _ = self.convert(ours, 'back', '--format', 't5x')
    self.check_same(back / 'checkpoint_3', SOURCE / 't5x_legacy/checkpoint_3')
    # A run of ours goes on from there.
    module = models.build(CONFIG)
    trainer = trainer_lib.Trainer(module, optim.adafactor(counting))
    params = checkpoint.open_checkpoint(checkpoint.at_step(ours)).read()
    store = checkpoint.open_state(checkpoint.at_step(ours))
    state = trainer.begin(5, params, jax.random.key(0), store)
    self.assertEqual(int(state.step), 3)
    theirs = leaves(SOURCE / 't5x_legacy/checkpoint_3')
    moments = tree.flatten(state.opt_state)
    for path in tree.flatten(params):
      np.testing.assert_array_equal(
        moments[f'0/v/{path}'], theirs[f'state/param_states/{path}/v']
      )

  def test_scanned_and_back(self):
    source = self.of_t5x()
    ours, _ = self.convert(source, 'ours', '--scan_layers', 'true')
    stacked = [p for p in leaves(ours / '3') if 'layers_' not in p]
    self.assertEqual(len(stacked), len(leaves(ours / '3')))
    back, _ = self.convert(
      ours, 'back', '--scan_layers', 'false', '--format', 't5x'
    )
    self.check_same(back / 'checkpoint_3', source / 'checkpoint_3')
    # Its stacks are not factored: T5X would factor them.
    _, said = self.convert(ours, 'theirs', '--format', 't5x', code=2)
    self.assertIn('whose layers are stacked', said)

  def test_scanned_of_t5x(self):
    family = models.family_of(models.build({**CONFIG, 'scan_layers': True}))
    optimizer, state = random_state(family, optim.adafactor(
      counting, momentum=0.9,
      logical_factor_rules=optim.standard_logical_factor_rules(),
    ))  # fmt: skip
    made = t5x_state.save(self.folder / 't5x', family, optimizer, state)
    config = {**CONFIG, 'scan_layers': True}
    (self.folder / 't5x' / checkpoint.CONFIG).write_text(json.dumps(config))
    ours, _ = self.convert(self.folder / 't5x', 'ours')
    back, _ = self.convert(ours, 'back', '--format', 't5x')
    self.check_same(back / made.name, made)
    # By rules a stack is factored, and its layers by themselves are not.
    _, said = self.convert(made, 'apart', '--scan_layers', 'false', code=2)
    self.assertIn('these moments are not the same for both', said)

  @parameterized.named_parameters(
    ('adamw', optim.adamw(counting), 'adamw'),
    ('adamw_of_one_rate', optim.adamw(0.1, max_gradient_norm=None), 'adamw'),
    (
      'adafactor',
      optim.adafactor(0.1, min_dim_size_to_factor=8, max_gradient_norm=1.0),
      'adafactor',
    ),
  )
  def test_of_a_run_of_ours(self, optimizer, name):
    family = models.family_of(models.build(CONFIG))
    _, state = random_state(family, optimizer)
    run = self.folder / 'run'
    kept = checkpoints_lib.Checkpoints(run / 'checkpoints')
    kept.save(state.replace(extras={'ema': state.params}), b'where')
    kept.close()
    checkpoints_lib.export(run / 'model', family, state.params)
    scanned, said = self.convert(run, 'scanned', '--scan_layers', 'true')
    self.assertIn(f'step 7, with the state of {name}', said)
    self.assertIn('not copied: extras', said)
    back, _ = self.convert(scanned, 'back', '--scan_layers', 'false')
    expected, found = leaves(run / 'checkpoints/7'), leaves(back / '7')
    self.assertEqual(
      found.keys(), {p for p in expected if not p.startswith('extras/')}
    )
    for path, leaf in found.items():
      np.testing.assert_array_equal(leaf, expected[path], path)
    if name == 'adamw':
      _, said = self.convert(run, 'theirs', '--format', 't5x', code=2)
      self.assertIn('of optim.adafactor alone', said)

  def test_mistakes(self):
    source = self.of_t5x()
    _, said = self.convert(source, 'x', '--format', 'npz', code=2)
    self.assertIn('--state is for --format t5x or orbax', said)
    (source / checkpoint.CONFIG).unlink()
    _, said = self.convert(source, 'x', code=2)
    self.assertIn('--state needs a config.json', said)
    bare = self.of_t5x('orbax', emb_dim=16)
    _, said = self.convert(bare, 'x', code=2)
    self.assertIn('the model', said)


if __name__ == '__main__':
  absltest.main()
