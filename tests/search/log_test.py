# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The log of a search: what is written when it is stopped, and goes on."""

import json
import pathlib
import signal

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.evaluation import base as evaluation
from mergejax.search import base
from mergejax.search import evolve
from mergejax.search import greedy
from mergejax.search import grid


class LogTest(parameterized.TestCase):
  @parameterized.parameters('evolve', 'grid', 'grid_compiled', 'greedy')
  def test_stopped_when_the_answer_is_written(self, strategy):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    models = [{'w': rng.normal(size=3).astype(np.float32)} for _ in range(4)]
    space = base.Space('linear', 4)
    calls = []

    def score(params):
      calls.append(1)
      if len(calls) == 3 and terminate:
        signal.raise_signal(signal.SIGTERM)
      return {'t': -float(np.square(params['w']).sum())}

    traced = evaluation.Evaluator(
      lambda p, data: {'t': -jnp.vdot(p['w'], p['w'])}, 0
    )
    points = grid.dirichlet(4, 6)

    def progress(done, total):
      if terminate and done == 2 and strategy == 'grid_compiled':
        signal.raise_signal(signal.SIGTERM)

    def run(name):
      with base.Log(folder / name, {'strategy': strategy, 'n': 4}) as log:
        if strategy == 'greedy':
          greedy.greedy(models, score, log=log)
        elif strategy == 'evolve':
          evaluate = lambda p: score(space.merge(models, jnp.asarray(p)))
          evolve.evolve(space, evaluate, budget=6, log=log)
        else:
          evaluate = score if strategy == 'grid' else traced
          grid.grid(
              space.merge, models, evaluate, points, log=log, chunk=2,
              progress=progress,
          )  # fmt: skip
      return log

    terminate = False
    run('whole')
    terminate = True
    calls.clear()
    count = 2 if strategy == 'grid_compiled' else 3
    with self.assertRaisesRegex(errors.Stopped, f'after {count} candidates'):
      run('stopped')
    self.assertLen((folder / 'stopped').read_text().splitlines(), 1 + count)
    terminate = False
    run('stopped')
    self.assertEqual(
      (folder / 'whole').read_bytes(), (folder / 'stopped').read_bytes()
    )

  def test_log_of_another_search(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'log'
    base.Log(path, {'seed': 1})
    with self.assertRaisesRegex(errors.UserError, 'other settings'):
      base.Log(path, {'seed': 2})
    found = json.loads(path.read_text())['search']['work']
    self.assertEqual(found, {'seed': 1})

  def test_no_finite_score(self):
    log = base.Log()
    log.add([0.0], {'t': float('nan')})
    with self.assertRaisesRegex(errors.UserError, 'finite'):
      log.best()


if __name__ == '__main__':
  absltest.main()
