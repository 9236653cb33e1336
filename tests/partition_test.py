# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Meshes, and what lies where on them."""

from absl.testing import absltest
from absl.testing import parameterized
import described_chips
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import step as step_lib


class MeshTest(absltest.TestCase):
  def test_sizes(self):
    mesh = partition.make_mesh(branch=4)
    self.assertEqual(
      dict(mesh.shape), {'branch': 4, 'data': 2, 'expert': 1, 'model': 1}
    )
    for wrong in (dict(branch=3), dict(data=2), dict(branch=-1, data=-1)):
      with self.assertRaisesRegex(errors.UserError, '8 device'):
        partition.make_mesh(**wrong)
    for wrong, message in (
      (dict(date=2), "Did you mean 'data'"), (dict(model=-2), 'model.* -2'),
      (dict(branch=-1, data=0), 'data.* 0'), (dict(data='8'), "data.* '8'"),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, message):
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


class SlicesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(branch=4, data=4), 1), (dict(branch=2, data=4, model=2), 2),
    (dict(data=8, model=2), 4), (dict(branch=8, model=2, data=1), 1),
  )  # fmt: skip
  def test_branch_goes_over_slices_first(self, sizes, data_over):
    mesh = partition.make_mesh(devices=described_chips.CHIPS[::-1], **sizes)
    self.assertEqual(
      dict(mesh.shape), dict(branch=1, expert=1, model=1) | sizes
    )
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    self.assertLen({chip.id for chip in mesh.devices.flat}, 16)
    # Whatever shares kernels is in one slice; so are the rows of an expert, but
    # for as many groups of them as there are slices without an expert.
    self.assertTrue((slices == slices[:, :, :1, :1]).all())
    for expert in slices:
      self.assertLen(set(expert.flat), data_over)

  def test_what_does_not_fit(self):
    with self.assertRaisesRegex(
      errors.UserError, '4 slices must divide branch x data'
    ):
      partition.make_mesh(
        devices=described_chips.CHIPS, branch=1, data=2, model=8
      )

  @parameterized.parameters(
    dict(branch=8, data=8), dict(branch=2, data=32), dict(data=8, model=8)
  )
  def test_axes_that_are_no_products_of_sides(self, **sizes):
    mesh = partition.make_mesh(devices=described_chips.torus(4, 4, 4), **sizes)
    self.assertEqual(
      dict(mesh.shape), dict(branch=1, data=1, expert=1, model=1) | sizes
    )
    self.assertLen({chip.id for chip in mesh.devices.flat}, 64)
    places = np.array([chip.coords for chip in mesh.devices.flat])
    outer, inner = sizes.values()
    for group in places.reshape(outer, inner, 3):  # each a block of its own
      self.assertEqual(np.prod(np.ptp(group, axis=0) + 1), inner)


class SpecTest(parameterized.TestCase):
  @parameterized.parameters(
    # (axes, shape, target of embed, spec) on data 2, expert 2, model 2
    (('embed', 'mlp'), (8, 8), ('data', 'expert'), P(('data', 'expert'), 'model')),
    # Of several the last are dropped until they divide.
    (('embed', 'mlp'), (6, 8), ('data', 'expert'), P('data', 'model')),
    (('embed', 'mlp'), (5, 7), ('data', 'expert'), P(None, None)),
    # Each axis of the mesh once: the first that asks gets it.
    (('mlp', 'heads'), (4, 4), None, P('model', None)),
    (('embed', 'mlp'), (8, 8), ('model', 'data'), P(('model', 'data'), None)),
    (None, (4, 4), None, P()),
    ((None, 'mlp'), (4, 4), None, P(None, 'model')),
  )  # fmt: skip
  def test_targets(self, axes, shape, embed, expected):
    mesh = partition.make_mesh(data=2, expert=2, model=2)
    rules = partition.ShardingRules().replace(params={'embed': embed})
    found = partition.spec_for(axes, shape, mesh, rules.params)
    self.assertEqual(found, expected)

  def test_batches_go_over_data_and_experts(self):
    mesh = partition.make_mesh(data=4, expert=2)
    rules = partition.ShardingRules().activations
    self.assertEqual(
      partition.spec_for(('batch', None), (8, 3), mesh, rules),
      P(('data', 'expert'), None),
    )

  def test_unknown_names(self):
    mesh = partition.make_mesh()
    with self.assertRaisesRegex(errors.ConfigError, "Did you mean 'embed'"):
      partition.spec_for(('embd',), (4,), mesh, partition.standard().params)
    with self.assertRaisesRegex(errors.ConfigError, "Did you mean 'model'"):
      partition.ShardingRules().replace(params={'embed': 'modl'})

  def test_every_axis_of_every_family_has_a_rule(self):
    mesh = partition.make_mesh(data=4, model=2)
    rules = partition.fsdp()
    for fields in (
      dict(model_type='t5x'), dict(model_type='lm'), dict(model_type='vit'),
      dict(model_type='resnet', norm='batch'), dict(model_type='vgg'),
      dict(model_type='mlp'),
    ):  # fmt: skip
      specs = models.family_of(models.build(fields)).specs()
      for path, spec in specs.items():
        with self.subTest(f'{fields["model_type"]} {path}'):
          self.assertIsNotNone(spec.axes)
          partition.spec_for(spec.axes, spec.shape, mesh, rules.params)


class BornShardedTest(absltest.TestCase):
  def test_same_bits_and_no_whole_copy(self):
    family = models.family_of(
      models.build(
        dict(model_type='mlp', hidden=(16, 8), image_shape=(4, 4, 1))
      )
    )
    mesh = partition.make_mesh(data=8)
    specs = family.specs()
    layout = partition.shardings(
      mesh, tree.unflatten(specs),
      {path: spec.axes for path, spec in specs.items()},
      partition.fsdp(),
    )  # fmt: skip
    key = jax.random.key(3)
    born = partition.init_sharded(family.init, layout, key)
    alone = jax.jit(family.init)(key)
    for path, leaf in tree.flatten(born).items():
      np.testing.assert_array_equal(leaf, tree.flatten(alone)[path], path)
    kernel = born['dense_0']['kernel']
    self.assertEqual(kernel.addressable_shards[0].data.shape, (2, 16))

  def test_every_device_calls_a_kernel_on_its_part(self):
    axes, shapes = ('batch', None, 'heads', None), []

    def kernel(x, y):
      shapes.append((x.shape, y.shape))
      return x * y

    def loss(x, y):
      call = partition.by_shard(kernel, [axes, axes], axes)
      return jnp.sum(jax.vmap(call, spmd_axis_name='branch')(x, y) ** 2)

    x = np.random.default_rng(0).normal(size=(2, 4, 3, 2, 5)).astype('float32')
    mesh = partition.make_mesh(branch=2, data=2, model=2)
    placed = jax.device_put(
      x, partition.sharding(mesh, ('branch', *axes), x.shape)
    )
    with partition.rules_of(mesh, partition.standard()):
      grad = jax.jit(jax.grad(loss)).lower(placed, placed).compile()
    self.assertEqual(shapes, [((2, 3, 1, 5),) * 2])
    self.assertNotIn('all-gather', grad.as_text())
    np.testing.assert_allclose(grad(placed, placed), 2 * x**3, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(x, x), 2 * x**3, rtol=1e-6)
    self.assertEqual(shapes[1:], [((4, 3, 2, 5),) * 2])  # without a mesh

  def test_constraints_are_nothing_without_a_mesh(self):
    x = jnp.ones((2, 3))
    self.assertIs(partition.constrain(x, ('batch', 'embed')), x)
    mesh = partition.make_mesh(data=8)

    def fn(x):
      with partition.rules_of(mesh, partition.standard()):
        return partition.constrain(x, ('batch', 'embed'))

    found = jax.jit(fn)(jnp.ones((8, 3)))
    self.assertEqual(found.addressable_shards[0].data.shape, (1, 3))


class FollowersTest(absltest.TestCase):
  def test_moments_and_averages_follow_their_parameters(self):
    specs = {
      'a/kernel': typing.LeafSpec((256, 128), np.dtype('f4'), ('embed', 'mlp')),
      'b/kernel': typing.LeafSpec((128, 128), np.dtype('f4'), ('mlp', 'embed')),
      'b/scale': typing.LeafSpec((128,), np.dtype('f4'), ('embed',)),
      'c/kernel': typing.LeafSpec(
        (256, 3, 128), np.dtype('f4'), ('embed', 'layers', 'mlp')
      ),
    }
    shapes = jax.tree.map(
      lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype),
      tree.unflatten(specs),
    )
    family = models.Classifier(None, example={})
    found = {}
    for name, optimizer in (
      ('adafactor', optim.adafactor(0.1, momentum=0.9)),
      ('adamw', optim.adamw(0.1)),
    ):
      stacks = {'c/kernel': specs['c/kernel'].axes}
      optimizer = optim.of_run(optimizer, 1, stacks)
      step = step_lib.make_step(family, optimizer)
      state = jax.eval_shape(
        step.init, shapes, jax.eval_shape(lambda: jax.random.key(0))
      )
      for path, axes in state_lib.logical_axes(state, specs).items():
        found[f'{name} {path}'] = axes
    ending = lambda name, end: {
      axes
      for path, axes in found.items()
      if path.startswith(name) and path.endswith(end)
    }
    self.assertEqual(ending('adamw', 'mu/a/kernel'), {('embed', 'mlp')})
    self.assertEqual(ending('adamw', 'nu/b/scale'), {('embed',)})
    # The mean over columns has the rows left, and the other way round; the
    # longer side is summed over first.
    self.assertEqual(ending('adafactor', 'v_row/a/kernel'), {('mlp',)})
    self.assertEqual(ending('adafactor', 'v_col/a/kernel'), {('embed',)})
    self.assertEqual(ending('adafactor', 'v_row/b/kernel'), {('mlp',)})
    self.assertEqual(ending('adafactor', 'v_col/b/kernel'), {('embed',)})
    # Of stacks Adafactor keeps the layers in front.
    of_stack = {
      (path.partition('stacked/c/kernel/')[2], axes)
      for path, axes in found.items()
      if 'stacked/c/kernel/' in path
    }
    self.assertContainsSubset(
      {('layers', 'mlp'), ('layers', 'embed'), ('layers', 'embed', 'mlp')},
      {axes for _, axes in of_stack},
    )
    self.assertEqual(
      ending('adamw', 'mu/c/kernel'), {('embed', 'layers', 'mlp')}
    )


if __name__ == '__main__':
  absltest.main()
