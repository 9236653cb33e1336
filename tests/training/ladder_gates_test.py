# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gates of a ladder follow a schedule, by NumPy's sigmoid."""

from absl.testing import absltest
import jax
import numpy as np
import optax
import small_adapted

import mergejax as mj
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import ladder_gates
from mergejax.training import step as step_lib


class ScheduledTest(absltest.TestCase):
  def test_gates_are_what_the_schedule_says(self):
    family, base = small_adapted.build('lm', num_layers=1)
    ladder = mj.adapters.ladder(
      reduction=2, gates='fixed', gate=0.1, temperature=0.2, merge_last=True,
      start='random',
    )  # fmt: skip
    adapted = mj.adapters.adapt(family, ladder)
    linear = optax.linear_schedule(0.1, 0.9, 4)
    opening = ladder_gates.scheduled(linear, temperature=0.2)
    step = step_lib.make_step(adapted, optax.sgd(0.1), transforms=[opening])
    params = adapted.start(base, jax.random.key(0))
    state = jax.jit(step.init)(params, jax.random.key(0))
    update = jax.jit(opening.update)
    gates = ('side/decoder/gate_0', 'side/gate_last')
    for number, mu in ((0, 0.1), (1, 0.3), (3, 0.7), (9, 0.9)):
      new = state.replace(step=state.step + number)
      extra, new, metrics = update(state.extras['gate'], state, new, {})
      leaves = tree.flatten(new.params)
      for path in gates:
        found = 1 / (1 + np.exp(-np.float64(leaves.pop(path)) / 0.2))
        np.testing.assert_allclose(found, mu, rtol=1e-5, err_msg=path)
      np.testing.assert_allclose([extra, metrics['gate']], mu, rtol=1e-6)
      for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, tree.flatten(params)[path], path)
    # They begin there, and have no moment.
    alpha = 0.2 * np.log(0.1 / 0.9)
    for path in gates:
      np.testing.assert_allclose(tree.flatten(params)[path], alpha, rtol=1e-6)
      self.assertFalse(adapted.learns(path))

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.ConfigError, 'says 0 at step 0'):
      ladder_gates.scheduled(lambda step: 0.0)
    found = ladder_gates.scheduled(lambda step: 0.5)
    with self.assertRaisesRegex(errors.ConfigError, 'says 1 at step 7'):
      found.check(7, {'gate': np.float32(1)})
    with self.assertRaisesRegex(errors.ConfigError, 'have none'):
      found.init({'side': {'up': {'bias': np.zeros(2)}}})


if __name__ == '__main__':
  absltest.main()
