# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Averages that a run keeps, and steps that it skips."""

import pathlib
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import optax

import mergejax as mj
from mergejax import training
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import step as step_lib

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_runs  # noqa: E402

losses_of, mlp, pictures = (
  small_runs.losses_of,
  small_runs.mlp,
  small_runs.pictures,
)


class TransformsTest(parameterized.TestCase):
  def test_averages_equal_the_merge_of_the_same_checkpoints(self):
    states = {}

    class Keep(training.Callback):
      def on_step(self, step, state):
        states[step] = jax.tree.map(np.array, state.params)

    transforms = [
      training.ema(0.5), training.lawa(2, 2), training.running(
        mj.linear(normalize=False), every=3, name='sum'),
      training.polynomial(2.0), training.one_minus_sqrt(start=3),
    ]  # fmt: skip
    _, state = losses_of(
      mlp(), 7, pictures(), transforms=transforms, callbacks=[Keep()]
    )
    expected = {
      'ema': mj.merge(
        list(states.values()), 'linear', weights=[2.0**i for i in range(7)]
      ),
      'lawa': mj.merge([states[4], states[6]], 'linear'),
      'sum': mj.merge(
        [states[3], states[6]], mj.linear(normalize=False)
      ),
      # Shamir and Zhang's weights for eta 2 are t (t + 1) / 2.
      'polynomial': mj.merge(
        list(states.values()), 'linear', weights=[1, 3, 6, 10, 15, 21, 28]
      ),
    }  # fmt: skip
    # What a decay of the updates by 1 - sqrt(j / 5) after step 3 comes to.
    annealed = tree.flatten(jax.tree.map(np.copy, states[3]))
    for j in range(1, 5):
      now, before = tree.flatten(states[3 + j]), tree.flatten(states[2 + j])
      for path in annealed:
        annealed[path] += (1 - np.sqrt(j / 5)) * (now[path] - before[path])
    expected['one_minus_sqrt'] = annealed
    for each in transforms:
      found = each.averaged(state.extras[each.name], state.params)
      for path, leaf in tree.flatten(expected[each.name]).items():
        np.testing.assert_allclose(
          tree.flatten(found)[path], leaf, rtol=1e-6, atol=1e-7,
          err_msg=f'{each.name} {path}',
        )  # fmt: skip

  def test_before_the_first_an_average_is_the_model(self):
    lawa = training.lawa(5, 2)
    _, state = losses_of(mlp(), 1, pictures(), transforms=[lawa])
    found = lawa.averaged(state.extras['lawa'], state.params)
    jax.tree.map(np.testing.assert_array_equal, found, state.params)

  def test_averages_go_on_where_a_run_does(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    run = lambda steps, directory=None: losses_of(
      mlp(), steps, pictures(), transforms=[training.ema(0.9)],
      directory=directory,
    )  # fmt: skip
    run(2, folder)
    losses, continued = run(4, folder)
    self.assertLen(losses, 2)
    _, whole = run(4)
    self.assertIn('ema', whole.extras)
    jax.tree.map(np.testing.assert_array_equal, continued, whole)

  @parameterized.parameters(
    (mj.ties(), 'looks at all models'),
    (mj.task_arithmetic(), 'needs a base'),
  )
  def test_methods_that_cannot_run(self, method, words):
    with self.assertRaisesRegex(errors.ConfigError, words):
      training.running(method)

  def test_steps_that_are_not_finite(self):
    good, bad = pictures(8), pictures(8)
    bad['images'][0] = np.nan
    skipped = []
    settings = dict(
      callbacks=[training.callbacks.on_log(
        lambda _, m: skipped.append(int(m['skipped'])))],
      transforms=[training.skip_nonfinite(stop_after=2), training.ema(0.5)],
    )  # fmt: skip
    folder = pathlib.Path(self.create_tempdir().full_path)
    fit = lambda batches, steps, directory=None: training.Trainer(
      mlp(), optax.adam(0.1), **settings
    ).fit(batches, steps=steps, directory=directory, log_every=1, save_every=1)
    # optax raises floats to integer powers for Adam's bias correction.
    with jax.numpy_dtype_promotion('standard'):
      found = fit([good, bad, good], 3)
      self.assertEqual(skipped, [0, 1, 1])
      clean = fit([good, good], 2)
      for name in ('params', 'opt_state'):
        jax.tree.map(
          np.testing.assert_array_equal, getattr(found, name),
          getattr(clean, name),
        )  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, '2 steps up to step 4'):
        fit([good, bad, good, bad, good], 5, folder)
    kept = checkpoints_lib.Checkpoints(folder / 'checkpoints')
    self.assertEqual(kept.latest(), 3)
    kept.close()

  def test_an_average_never_sees_a_step_that_is_skipped(self):
    good, bad = pictures(8), pictures(8)
    bad['images'][0] = np.nan
    transforms = [training.skip_nonfinite(), training.ema(0.5)]
    skipped, ahead = [
      training.Trainer(mlp(), optax.sgd(0.1), transforms=order).fit(
        [good, bad, good], steps=3
      )
      for order in (transforms, transforms[::-1])
    ]
    self.assertTrue(
      all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ahead.extras))
    )
    jax.tree.map(np.testing.assert_array_equal, ahead.extras, skipped.extras)

  def test_a_window_does_not_decay(self):
    with self.assertRaisesRegex(errors.ConfigError, 'two ways to forget'):
      training.running(mj.linear(), window=2, decay=0.5)

  def test_numbers_that_are_none(self):
    for make, words in (
      (lambda: training.polynomial(-1), 'eta must be'),
      (lambda: training.one_minus_sqrt(start=-1), 'start must be'),
      (lambda: training.ema(1.0), 'decay must be'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, words):
        make()

  def test_two_of_a_name(self):
    with self.assertRaisesRegex(errors.ConfigError, "called 'ema'"):
      step_lib.make_step(
        mlp(), optax.sgd(0.1), transforms=[training.ema(0.5), training.ema(0.9)]
      )


if __name__ == '__main__':
  absltest.main()
