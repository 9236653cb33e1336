# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0

import ast
import functools
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.nn import lm
from mergejax.training import arrays
from mergejax.training import callbacks
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import loop
from mergejax.training import losses
from mergejax.training import optim
from mergejax.training import run as run_lib
from mergejax.training import schedules
from mergejax.training import step as step_lib


def tokens(count=24, length=8, vocab=20):
  rng = np.random.default_rng(0)
  targets = rng.integers(3, vocab, (count, length)).astype(np.int32)
  inputs = np.pad(targets[:, :-1], [(0, 0), (1, 0)])
  return {'decoder_input_tokens': inputs, 'decoder_target_tokens': targets}


@functools.cache
def setup(**changes):
  """A state and a step; compiled once, however many runs begin with them."""
  module = lm.LanguageModel(
      lm.LMConfig(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4,
                  num_layers=1, mlp_dim=16, **changes)
  )  # fmt: skip
  optimizer = optim.adafactor(0.1)
  key = jax.random.key(0)
  step = step_lib.make_step(module, optimizer)
  return step.init(models.family_of(module).init(key), key), jax.jit(
    step.update
  )


def same_bits(a, b):
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b)
  )


class SchedulesTest(absltest.TestCase):
  def test_t5x_schedules(self):
    golden = goldens.load('t5x_lr_schedules')
    checked = 0
    for name, text in golden.items():
      if name.startswith('cfg/'):
        schedule = schedules.factors(**ast.literal_eval(str(text)))
        found = [float(schedule(int(step))) for step in golden['steps']]
        expected = golden[name.replace('cfg/', 'lr/')]
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)
        checked += 1
    self.assertEqual(checked, 7)

  def test_warmup_cosine(self):
    schedule = schedules.warmup_cosine(
      1.0, steps=100, warmup_steps=10, final_share=0.1
    )
    found = [float(schedule(t)) for t in (0, 5, 10, 55, 100, 500)]
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)

  def test_warmup_linear(self):
    expected = goldens.load('tfew_losses')['lr_schedule_1000_steps']
    rate = schedules.over(schedules.warmup_linear(3e-3), 1000)
    found = rate(np.arange(1001))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    counted = schedules.warmup_linear(3e-3, warmup=60, steps=1000)
    np.testing.assert_array_equal(counted(np.arange(1002))[:-1], found)
    with self.assertRaisesRegex(errors.UserError, 'warm-up of 60'):
      schedules.warmup_linear(1.0, warmup=60, steps=60)

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'rsqrt_decay'"):
      schedules.factors('constant * rsqr_decay')
    with self.assertRaisesRegex(errors.UserError, 'warm-up'):
      schedules.warmup_cosine(1.0, steps=10, warmup_steps=10)


class StepTest(parameterized.TestCase):
  def test_smoothing_equals_its_definition(self):
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(1, 5)), np.array([2])
    smoothing = 0.2
    p = np.exp(logits) / np.exp(logits).sum()
    wanted = np.full(5, smoothing / 4)
    wanted[2] = 1 - smoothing
    expected = -(wanted * np.log(p)).sum() + (wanted * np.log(wanted)).sum()
    loss, _ = losses.token_cross_entropy(
      logits.astype(np.float32), target, label_smoothing=smoothing
    )
    np.testing.assert_allclose(loss[0], expected, rtol=1e-5)

  def test_gradient_with_z_loss(self):
    logits = jnp.asarray(
      np.random.default_rng(0).normal(size=(1, 5)), jnp.float32
    )
    z_loss = 0.1
    grad = jax.grad(
      lambda z: losses.token_cross_entropy(z, np.array([2]), z_loss=z_loss)[0][
        0
      ]
    )(logits)
    log_z = jax.nn.logsumexp(logits)
    expected = (1 + 2 * z_loss * log_z) * jax.nn.softmax(
      logits
    ) - jax.nn.one_hot(np.array([2]), 5)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)

  def test_packed_sequences_weigh_the_same(self):
    weights = np.array([[1, 1, 1, 1, 1, 0]], np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    factor, scaled = losses.normalizer(
      'AVERAGE_PER_SEQUENCE', segments, weights, segments
    )
    np.testing.assert_allclose(factor, 2.0, rtol=1e-6)
    np.testing.assert_allclose(
      scaled[0], [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 0], rtol=1e-6
    )
    with self.assertRaisesRegex(errors.UserError, 'NUM_REAL_TARGET_TOKENS'):
      losses.normalizer('NUM_REAL_TOKENS', segments, weights)

  def test_loss_does_not_depend_on_padding_rows(self):
    state, step = setup()
    batch = {k: v[:4] for k, v in tokens().items()}
    padded = {k: np.pad(v, [(0, 4), (0, 0)]) for k, v in batch.items()}
    _, a = step(state, batch)
    _, b = step(state, padded)
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-6)
    np.testing.assert_allclose(a['grad_norm'], b['grad_norm'], rtol=1e-5)

  def test_training_learns(self):
    state, step = setup()
    batch = tokens(count=4)
    _, first = step(state, batch)
    for _ in range(60):
      state, metrics = step(state, batch)
    self.assertLess(metrics['loss'], 0.5 * first['loss'])
    self.assertEqual(int(state.step), 60)


class LoopTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def fit(self, steps, folder=None, **changes):
    state, step = setup(**changes)
    stream = arrays.ArrayStream(tokens(), 4, seed=1)
    checkpoints = folder and checkpoints_lib.Checkpoints(folder)
    state = loop.fit(
      step, state, stream, steps=steps, checkpoints=checkpoints, save_every=3
    )
    if checkpoints:
      checkpoints.close()
    return state, stream

  def test_a_continued_run_has_the_same_bits(self):
    # Dropout too goes on where it was; runs without it are continued below.
    whole, stream = self.fit(11, dropout_rate=0.3)
    self.fit(4, self.folder, dropout_rate=0.3)
    self.fit(7, self.folder, dropout_rate=0.3)
    parts, again = self.fit(11, self.folder, dropout_rate=0.3)
    same_bits(whole, parts)
    self.assertEqual(stream.state(), again.state())

  def test_a_step_cut_short_does_not_count(self):
    self.fit(6, self.folder)
    cut = self.folder / '9.orbax-checkpoint-tmp'
    cut.mkdir()
    (cut / 'state').mkdir()
    checkpoints = checkpoints_lib.Checkpoints(self.folder)
    self.assertEqual(checkpoints.latest(), 6)
    checkpoints.close()

  def test_fewer_steps_than_were_made_are_refused(self):
    """The only model there is has made more."""
    self.fit(6, self.folder)
    self.fit(6, self.folder)
    with self.assertRaisesRegex(errors.UserError, 'made 6 steps.*the 5 asked'):
      self.fit(5, self.folder)

  @parameterized.parameters(
    ({'steps': 'ten'}, 'steps must be .* 0 or more, not'),
    ({'steps': -1}, '0 or more, not -1'),
    ({'steps': 2, 'save_every': 0}, 'save_every must be'),
    ({'steps': 2, 'log_every': 1.5}, 'log_every must be'),
  )
  def test_numbers_of_steps(self, numbers, message):
    with self.assertRaisesRegex(errors.UserError, message):
      loop.fit(None, None, None, **numbers)

  def test_another_model_is_refused(self):
    self.fit(3, self.folder)
    with self.assertRaisesRegex(errors.UserError, 'does not fit this run'):
      self.fit(6, self.folder, logits_via_embedding=True)

  def test_sigterm_saves_and_stops(self):
    state, step = setup()
    checkpoints = checkpoints_lib.Checkpoints(self.folder)
    stream = arrays.ArrayStream(tokens(), 4, seed=1)

    def stop(at, metrics):
      del metrics
      if at == 5:
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, 'step 5 of 50'):
      loop.fit(
          step, state, stream, steps=50, checkpoints=checkpoints,
          save_every=100, log_every=1, callbacks=[callbacks.on_log(stop)],
      )  # fmt: skip
    self.assertEqual(checkpoints.latest(), 5)
    checkpoints.close()
    parts, _ = self.fit(11, self.folder)
    same_bits(parts, self.fit(11)[0])

  def test_full_disk_keeps_the_previous_step(self):
    self.fit(3, self.folder)
    code = (
      'import resource, sys\n'
      f'sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n'
      f'sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})\n'
      'import train_test\n'
      'from mergejax.core import errors\n'
      'resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n'
      'test = train_test.LoopTest("fit")\n'
      'try:\n'
      f'  test.fit(6, {str(self.folder)!r})\n'
      'except errors.UserError as error:\n'
      '  print(error)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )
    self.assertIn('Could not save', done.stdout, done.stderr[-2000:])
    checkpoints = checkpoints_lib.Checkpoints(self.folder)
    self.assertEqual(checkpoints.latest(), 3)
    checkpoints.close()
    parts, _ = self.fit(11, self.folder)
    same_bits(parts, self.fit(11)[0])

  def test_too_few_examples_for_a_batch(self):
    with self.assertRaisesRegex(errors.UserError, 'Batches of 99'):
      arrays.ArrayStream(tokens(), 99)

  def test_arrays_are_all_seen_once_an_epoch(self):
    stream = arrays.ArrayStream({'x': np.arange(12)}, 4, seed=5)
    epochs = [
      np.concatenate([next(stream)['x'] for _ in range(3)]) for _ in range(2)
    ]
    for epoch in epochs:
      self.assertCountEqual(epoch.tolist(), range(12))
    self.assertFalse((epochs[0] == epochs[1]).all())


class CallbacksTest(absltest.TestCase):
  def test_jsonl_has_every_step_once(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'm.jsonl'
    loss = lambda value: {'loss': np.array([value, value + 1])}
    run = run_lib.Run(None, None, 4, experts=['a', 'b'])
    hook = callbacks.jsonl(path)
    hook.on_start(run)
    for step in (1, 2, 3):
      hook.on_log(step, loss(step))
    with path.open('a') as file:
      file.write('{"step": 4, "lo')  # a line cut short by a kill
    hook = callbacks.jsonl(path)
    hook.on_start(run)
    for step in (3, 4):
      hook.on_log(step, loss(10 * step))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    self.assertEqual([row['step'] for row in rows], [1, 2, 3, 4])
    self.assertEqual(rows[2], {'step': 3, 'loss/a': 30.0, 'loss/b': 31.0})

  def test_plain_lines_without_a_terminal(self):
    out = io.StringIO()
    hook = callbacks.progress(out)
    hook.on_start(run_lib.Run(None, None, 20, 'seed'))
    for step in (10, 20):
      hook.on_log(step, {'loss': np.array(2.0)})
    self.assertEqual(
        out.getvalue(), 'seed: step 10/20, loss 2.000\nseed: step 20/20, '
        'loss 2.000\n'
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
