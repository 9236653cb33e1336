# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import partition
from mergejax.core import axes
from mergejax.core import errors
from mergejax.core import registry
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


class AxesTest(absltest.TestCase):
  def test_an_unknown_kernel_is_an_error(self):
    spec = {'encoder/conv/kernel': typing.LeafSpec((3, 3), np.dtype('float32'))}
    with self.assertRaisesRegex(errors.UserError, 'encoder/conv/kernel'):
      axes.logical_axes(spec)

  def test_a_stacked_kernel_needs_its_own_axes(self):
    spec = typing.LeafSpec((8, 2, 16), np.dtype('float32'))
    path = 'encoder/mlp/wi/kernel'
    with self.assertRaisesRegex(errors.UserError, 'stacked'):
      axes.logical_axes({path: spec})
    named = typing.LeafSpec(spec.shape, spec.dtype, ('embed', 'layers', 'mlp'))
    self.assertEqual(axes.logical_axes({path: named})[path], named.axes)


class MeshTest(absltest.TestCase):
  def test_sizes(self):
    mesh = partition.make_mesh(branch=4)
    self.assertEqual(
      dict(mesh.shape), {'branch': 4, 'data': 2, 'expert': 1, 'model': 1}
    )
    for wrong in (dict(branch=3), dict(data=2), dict(branch=-1, data=-1)):
      with self.assertRaisesRegex(errors.UserError, '8 device'):
        partition.make_mesh(**wrong)

  def test_rules(self):
    mesh = partition.make_mesh(data=2, model=4)
    spec = lambda *args: partition.sharding(mesh, *args).spec
    self.assertEqual(tuple(spec(('embed', 'mlp'))), (None, 'model'))
    # A mesh axis is used once: the first array axis that asks gets it.
    self.assertEqual(tuple(spec(('vocab', 'mlp'))), ('model', None))
    # 259 rows do not divide over 4 shards.
    self.assertEqual(tuple(spec(('vocab', 'embed'), (259, 8))), (None, None))
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'embed'"):
      spec(('embd',))


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
