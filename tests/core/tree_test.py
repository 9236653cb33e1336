# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trees by name: paths, rules over paths, what is no array."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing


class TreeTest(absltest.TestCase):
  def test_flatten_unflatten_round_trip(self):
    nested = {'a': {'b': 1, 'c': {'d': 2}}, 'e': 3}
    self.assertEqual(tree.unflatten(tree.flatten(nested)), nested)
    self.assertEqual(list(tree.flatten(nested)), ['a/b', 'a/c/d', 'e'])

  def test_a_path_is_a_leaf_or_a_folder(self):
    for paths in ({'a': 1, 'a/b': 2}, {'a/b': 2, 'a': 1}):
      with self.assertRaisesRegex(errors.UserError, "'a"):
        tree.unflatten(paths)

  def test_specs_see_shapes_only(self):
    abstract = jax.eval_shape(lambda: {'w': jnp.zeros((2, 3), jnp.bfloat16)})
    self.assertEqual(
      tree.specs(abstract)['w'],
      typing.LeafSpec((2, 3), np.dtype(jnp.bfloat16)),
    )

  def test_first_rule_wins(self):
    values = tree.apply_rules(
      [('.*/bias', 'no'), ('enc/.*', 'half'), ('.*', 'yes')],
      ['enc/bias', 'enc/kernel', 'dec/kernel'],
      'decay',
    )
    self.assertEqual(list(values.values()), ['no', 'half', 'yes'])

  def test_rules_must_match_the_full_path(self):
    with self.assertRaisesRegex(errors.UserError, 'No decay rule matches 1 of'):
      tree.apply_rules([('enc', 1)], ['enc/kernel'], 'decay')

  def test_a_rule_without_use_is_an_error(self):
    with self.assertRaisesRegex(errors.UserError, 'layers_9'):
      tree.apply_rules([('layers_9/.*', 1), ('.*', 2)], ['a'], 'decay')

  def test_a_rule_behind_a_wider_one_is_an_error(self):
    with self.assertRaisesRegex(errors.UserError, 'a/b'):
      tree.apply_rules([('.*', 1), ('a/b', 2)], ['a/b', 'c'], 'decay')

  def test_an_invalid_expression(self):
    with self.assertRaisesRegex(errors.UserError, 'not a regular expression'):
      tree.apply_rules([('(', 1)], ['a'], 'decay')


if __name__ == '__main__':
  absltest.main()
