# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The survey of task vectors against NumPy."""

from absl.testing import absltest
import numpy as np

from mergejax import statistics
from mergejax.checkpoints import base as store_base
from mergejax.core import errors


class SurveyTest(absltest.TestCase):
  def test_against_numpy(self):
    rng = np.random.default_rng(0)
    base = {'a': rng.normal(size=(4, 3)).astype(np.float32), 'n': np.arange(2)}
    several = [
      {'a': base['a'] + rng.normal(size=(4, 3)).astype(np.float32),
       'n': base['n']} for _ in range(3)
    ]  # fmt: skip
    found = statistics.survey(several, base)
    self.assertEqual(found.paths, ('a',))
    deltas = np.stack([(m['a'] - base['a']).ravel() for m in several])
    np.testing.assert_allclose(
      found.norms[0], np.linalg.norm(deltas, axis=1), rtol=1e-5
    )
    unit = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    np.testing.assert_allclose(
      found.whole_cosines(), unit @ unit.T, rtol=1e-4, atol=1e-6
    )
    same = (np.abs(np.sign(deltas).sum(axis=0)) == 3).mean()
    self.assertAlmostEqual(found.agreement[0], same)
    self.assertIn('whole model', found.to_text())

  def test_stacked_layers_are_leaves_of_their_own(self):
    rng = np.random.default_rng(0)
    apart = [
      {f'layers_{i}': {'w': rng.normal(size=(3, 2))} for i in range(4)}
      for _ in range(3)
    ]
    stacked = [
      store_base.MemoryStore(
        {'layers': {'w': np.stack([m[f'layers_{i}']['w'] for i in range(4)], 1)}},
        axes=[('layers/w', ('embed', 'layers', 'mlp'))],
      )
      for m in apart
    ]  # fmt: skip
    expected = statistics.survey(apart[1:], apart[0])
    found = statistics.survey(stacked[1:], stacked[0])
    self.assertEqual(found.paths, tuple(f'layers/w[{i}]' for i in range(4)))
    for name in ('base_norms', 'norms', 'products', 'moved', 'agreement'):
      np.testing.assert_allclose(
        getattr(found, name), getattr(expected, name), rtol=1e-6, err_msg=name
      )

  def test_entries_that_nobody_moved_do_not_agree(self):
    base = {'still': np.ones(98), 'two': np.ones(2)}
    models = [{**base, 'two': np.float64(two)} for two in ([2, 2], [2, 0])]
    whole = statistics.survey(models, base).to_rows()[-1]
    self.assertEqual(whole['sign_agreement'], 0.5)

  def test_models_without_weights(self):
    with self.assertRaisesRegex(errors.UserError, 'no floating parameter'):
      statistics.survey([{'n': np.arange(2)}], {'n': np.arange(2)})

  def test_models_that_differ(self):
    with self.assertRaisesRegex(errors.UserError, '- a'):
      statistics.survey([{'b': np.zeros(2)}], {'a': np.zeros(2)})


if __name__ == '__main__':
  absltest.main()
