# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Searches without gradients find, resume and repeat."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.search import base
from mergejax.search import evolve


class EvolveTest(parameterized.TestCase):
  @parameterized.parameters('random', 'one_plus_one', 'cmaes')
  def test_finds_resumes_and_repeats(self, strategy):
    folder = pathlib.Path(self.create_tempdir().full_path)
    space = base.Space('linear', 3, low=-1.0)
    target = np.array([0.3, -0.2, 0.6])
    calls = []

    def evaluate(point):
      calls.append(1)
      return {'t': -float(np.square(point - target).sum())}

    run = lambda name, evaluate=evaluate, **more: evolve.evolve(
        space, evaluate, budget=60, strategy=strategy, seed=3,
        log=base.Log(folder / name, {'strategy': strategy}), **more,
    )  # fmt: skip
    whole = run('whole')
    self.assertGreater(
      whole.best().objective, -0.3 if strategy == 'random' else -0.04
    )

    def progress(done, total):
      if done == 25:
        raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      run('killed', progress=progress)
    calls.clear()
    run('killed')
    self.assertLen(calls, 35)
    self.assertEqual(
      (folder / 'whole').read_bytes(), (folder / 'killed').read_bytes()
    )


if __name__ == '__main__':
  absltest.main()
