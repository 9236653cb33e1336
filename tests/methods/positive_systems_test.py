# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Systems solved by blocks: NumPy's solution, and panels alone are sent."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import partition
from mergejax.methods import positive_systems
from mergejax.pods import collectives
from mergejax.pods import hlo

COLUMNS = 5


def system(size):
  """A well-conditioned system, and its solution in float64."""
  rng = np.random.default_rng(size)
  inputs = rng.normal(size=(3 * size, size))
  matrix = (inputs.T @ inputs / len(inputs)).astype(np.float32)
  right = rng.normal(size=(size, COLUMNS)).astype(np.float32)
  return matrix, right, np.linalg.solve(matrix.astype(np.float64), right)


class PositiveSystemsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one_block', 6, 6),
    ('blocks', 24, 8),
    ('a_block_that_is_not_full', 21, 8),
  )
  def test_the_solution_is_that_of_numpy(self, size, block):
    matrix, right, expected = system(size)
    found, pivots = positive_systems.by_blocks(matrix, right, block=block)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # Whatever the order of rows, the pivots multiply to the determinant.
    self.assertEqual(pivots.shape, (size,))
    _, log_determinant = np.linalg.slogdet(matrix.astype(np.float64))
    np.testing.assert_allclose(np.log(pivots).sum(), log_determinant, rtol=1e-4)
    whole, own = positive_systems.solve(jnp.asarray(matrix), right)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.log(own).sum(), log_determinant, rtol=1e-4)

  def test_a_singular_matrix_has_no_solution(self):
    matrix = np.ones((8, 8), np.float32)
    found, _ = positive_systems.by_blocks(matrix, np.ones((8, 1), 'f'), block=4)
    self.assertFalse(np.isfinite(found).all())

  @parameterized.named_parameters(('rows', 0), ('columns', 1))
  def test_devices_are_sent_the_rows_of_a_round_alone(self, axis):
    mesh = partition.make_mesh(data=8)
    names = ['batch', None] if axis == 0 else [None, 'batch']
    layout = lambda names: partition.sharding(mesh, names)
    size, block = 64, 8
    matrix, right, expected = system(size)
    given = (
      jax.device_put(matrix, layout(names)),
      jax.device_put(right, layout(['batch', None])),
    )
    lowered = positive_systems.by_blocks.lower(*given, block=block, mesh=mesh)
    compiled = lowered.compile()
    found, _ = compiled(*given)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    sent = collectives.found(hlo.Program(compiled.as_text() or ''), mesh)
    self.assertNotEmpty(sent)
    for each in sent:
      self.assertLessEqual(each.largest, 4 * block * size, each)
    # The matrix there and back, and little beside.
    most = 4 * (2 * size * size + 2 * size * COLUMNS)
    self.assertLess(sum(each.sent_bytes for each in sent), most)

  def test_the_program_does_not_grow_with_the_matrix(self):
    traced = lambda size: positive_systems.by_blocks.trace(
      *(jax.ShapeDtypeStruct(s, 'float32') for s in ((size, size), (size, 2))),
      block=256,
    )
    count = lambda size: str(traced(size).jaxpr).count(' = ')
    self.assertEqual(count(1024), count(10240))

  def test_programs_for_a_tpu_go_by_blocks(self):
    mesh = partition.make_mesh(data=8)
    matrix, right, _ = system(16)
    seen = []

    def by_blocks(*arrays, block, mesh):
      seen.append((block, mesh))
      return arrays

    with mock.patch.multiple(
      positive_systems,
      by_blocks=by_blocks,
      _where=lambda matrix: (mesh, 'tpu'),
    ):
      positive_systems.solve(matrix, right)
    self.assertEqual(seen, [(16, mesh)])


if __name__ == '__main__':
  absltest.main()
