# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Registries: duplicates, misses and options are told."""

from absl.testing import absltest

from mergejax.core import errors
from mergejax.core import registry


class RegistryTest(absltest.TestCase):
  def test_duplicates_misses_and_options(self):
    shapes = registry.Registry('shape')
    shapes.register('square')(lambda *, side: side * side)
    with self.assertRaisesRegex(ValueError, 'already registered'):
      shapes.register('square')(lambda: 0)
    self.assertEqual(shapes.build('square', side=3), 9)
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'square'"):
      shapes.build('sqare')
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'side'"):
      shapes.build('square', sied=2)
    with self.assertRaisesRegex(errors.UserError, "needs 'side'"):
      shapes.build('square')


if __name__ == '__main__':
  absltest.main()
