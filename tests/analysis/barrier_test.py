# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Lines and planes between models."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.analysis import barrier
from mergejax.core import errors
from mergejax.evaluation import base as evaluation
from mergejax.evaluation import plots


def bump(params):
  """A loss with a bump in the middle of the line from 0 to 1."""
  x = params['w'][0]
  return {'loss': x * (1 - x) * 4, 'accuracy': x}


def score(params, data):
  """The same as scores, of which more is better."""
  found = bump(params)
  return {**found, 'loss': -(found['loss'] + data)}


class LineTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.a = {'n': np.array([3]), 'w': np.zeros(2, np.float32)}
    self.b = {'n': np.array([3]), 'w': np.ones(2, np.float32)}

  def test_barrier(self):
    plain = barrier.line(
      self.a, self.b, lambda p: jax.tree.map(float, bump(p)), points=5
    )
    compiled = barrier.line(
      self.a, self.b, evaluation.Evaluator(score, jnp.float32(0.5)), points=5
    )
    np.testing.assert_allclose(plain.values['loss'], [0, 0.75, 1, 0.75, 0])
    np.testing.assert_allclose(
      -compiled.values['loss'], plain.values['loss'] + 0.5, rtol=1e-6
    )
    self.assertAlmostEqual(plain.barrier(), 1.0)
    self.assertAlmostEqual(compiled.barrier(), 1.0, places=6)
    self.assertAlmostEqual(plain.barrier('accuracy'), 0.0, places=6)

  def test_of_an_evaluator_more_is_better_whatever_it_is_called(self):
    for sign, expected in ((-1.0, 1.0), (1.0, 0.0)):
      for name in ('loss', 'task'):
        valley = evaluation.Evaluator(
          lambda p, data, name=name: {name: data * bump(p)['loss']},
          jnp.float32(sign),
        )
        line = barrier.line(self.a, self.b, valley, points=5)
        self.assertAlmostEqual(line.barrier(name), expected, places=6)
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'task'"):
      line.barrier('tasks')

  def test_ends_are_the_models(self):
    for share, expected in ((0.0, self.a), (1.0, self.b)):
      found = barrier.between((self.a, self.b), jnp.array([share]))
      jax.tree.map(np.testing.assert_array_equal, found, expected)

  def test_plane(self):
    a, b, c = (
      {'w': np.array(w, np.float32)} for w in ([1, 1], [3, 1], [1.5, 4])
    )
    seen = evaluation.Evaluator(
      lambda p, data: {'loss': p['w'][0], 'other': p['w'][1]}, jnp.zeros(())
    )
    found = barrier.plane(a, b, c, seen, points=4)
    np.testing.assert_allclose(
      found.corners, [[0, 0], [2, 0], [0.5, 3]], atol=1e-5
    )
    # Here weight space is the plane itself, so values are coordinates.
    for name, offset in (
      ('loss', found.x[None, :]),
      ('other', found.y[:, None]),
    ):
      np.testing.assert_allclose(
        found.values[name], 1 + np.broadcast_to(offset, (4, 4)), atol=1e-4
      )
    folder = self.create_tempdir().full_path
    plots.plane(
      found.x, found.y, found.values['loss'], found.corners,
      f'{folder}/plane.png',
    )  # fmt: skip
    line = barrier.line(a, b, seen, points=3)
    curve = line.lambdas, line.values['loss']
    plots.lines({'a to b': curve}, f'{folder}/line.png')

  def test_bad_input(self):
    with self.assertRaisesRegex(errors.UserError, '- w'):
      barrier.line(self.a, {'n': self.a['n']}, bump)
    with self.assertRaisesRegex(errors.UserError, 'two points'):
      barrier.line(self.a, self.b, bump, points=1)
    a, b = {'w': np.zeros(2)}, {'w': np.ones(2)}
    with self.assertRaisesRegex(errors.UserError, 'one line'):
      barrier.plane(a, b, {'w': np.full(2, 2.0)}, bump)
    with self.assertRaisesRegex(errors.UserError, 'the same'):
      barrier.plane(a, a, b, bump)


if __name__ == '__main__':
  absltest.main()
