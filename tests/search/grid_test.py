# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Grids: one program for all points, lattices, pairs."""

from absl.testing import absltest
import goldens
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.evaluation import base as evaluation
from mergejax.search import base
from mergejax.search import grid


def quadratic(target):
  """An evaluator whose score is best where 'w' is the target."""
  return evaluation.Evaluator(
    lambda params, data: {'t': -jnp.sum(jnp.square(params['w'] - data))},
    jnp.asarray(target, jnp.float32),
  )


class GridTest(absltest.TestCase):
  def test_one_program_finds_the_best(self):
    models = [{'w': np.zeros(2, np.float32)}, {'w': np.ones(2, np.float32)}]
    space = base.Space('linear', 2, options={'normalize': False})
    traces = []

    def merge(models, point):
      traces.append(1)
      return space.merge(models, jnp.stack([1 - point[0], point[0]]))

    points = np.linspace(0, 1, 21)[:, None]
    log = grid.grid(merge, models, quadratic(0.35), points)
    self.assertAlmostEqual(log.best().point[0], 0.35)
    self.assertLen(log.candidates, 21)
    self.assertLen(traces, 1)
    plain = grid.grid(
      merge, models,
      lambda p: {'t': -float(np.square(p['w'] - 0.35).sum())}, points,
    )  # fmt: skip
    np.testing.assert_allclose(
      [one.objective for one in plain.candidates],
      [one.objective for one in log.candidates],
      atol=1e-6,
    )

  def test_lattice(self):
    points = grid.lattice(base.Space('linear', 2), 3)
    self.assertEqual(points.shape, (9, 2))
    with self.assertRaisesRegex(errors.UserError, "'cmaes'"):
      grid.lattice(base.Space('linear', 8), 11)

  def test_pairs(self):
    points = grid.pairs(5)
    np.testing.assert_allclose(
      points, goldens.load('fisher_merging')['pairwise_grid_5']
    )
    drawn = grid.dirichlet(3, 4, seed=1)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    np.testing.assert_array_equal(drawn, grid.dirichlet(3, 4, seed=1))


if __name__ == '__main__':
  absltest.main()
