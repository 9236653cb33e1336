# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The sparse layer on a mesh: the numbers of one device, and what travels."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import tiers

from mergejax import partition
from mergejax.core import errors
from mergejax.nn import moe
from mergejax.nn import moe_config
from mergejax.nn import moe_metrics


def layer(**settings):
  config = moe_config.MoeConfig(
    **{'num_experts': 4, 'group_size': 8, 'min_capacity': 1, **settings}
  )
  return moe.MoeLayer(config, 16, ('gelu', 'linear'))


def numbers():
  """Parameters and inputs of the golden layer, its rows twice.

  Four rows do not divide by eight devices.
  """
  arrays = goldens.load('moe_flaxformer')
  inputs = np.tile(arrays['layer/inputs'], (2, 1, 1))
  return goldens.subtree(arrays, 'layer/params/'), inputs


def graded(module, real=None):
  """`((loss, outputs), gradients)` of parameters and inputs.

  A function of its own each time: what was traced for one device is not for
  eight.
  """

  def loss(params, inputs):
    outputs, left = module.apply(
      {'params': params}, inputs, real, mutable=[moe_metrics.COLLECTION]
    )
    aux = left[moe_metrics.COLLECTION]['auxiliary_loss']
    return jnp.sum(jnp.square(outputs)) + aux, outputs

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def placed(params, inputs, mesh):
  """Shardings of the arguments of `graded`."""
  rules = partition.standard()
  of_kernel = lambda axes: partition.sharding(mesh, axes, None, rules.params)
  wide = of_kernel(('expert', 'mlp_embed', 'expert_mlp'))
  kernels = {name: {'kernel': wide} for name in params['expert']}
  kernels['wo'] = {'kernel': of_kernel(('expert', 'expert_mlp', 'mlp_embed'))}
  whole = partition.replicated(mesh)
  router = jax.tree.map(lambda _: whole, params['router'])
  rows = partition.sharding(mesh, ('batch', None, None), inputs.shape)
  return {'expert': kernels, 'router': router}, rows


def on_mesh(module, params, inputs, real=None, **sizes):
  """What `graded` finds on a mesh, and the compiled program."""
  mesh = partition.make_mesh(**sizes)
  where, rows = placed(params, inputs, mesh)
  with partition.rules_of(mesh, partition.standard()):
    jitted = jax.jit(
      graded(module, real), in_shardings=(where, rows),
      out_shardings=((None, rows), (where, rows)),
    )  # fmt: skip
    compiled = jitted.lower(params, inputs).compile()
  found = compiled(jax.device_put(params, where), jax.device_put(inputs, rows))
  return found, compiled.as_text()


def gathered(hlo):
  """Shapes of what is gathered."""
  return re.findall(r'= (\S+) all-gather(?:-start)?\(', hlo)


@tiers.slow('test_rows[12]', 'test_experts_must_divide1')
class MeshTest(parameterized.TestCase):
  def same(self, found, wanted):
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

  def no_kernel_travels(self, hlo):
    for shape in gathered(hlo):
      self.assertNotRegex(shape, r'f32\[4,(8,16|16,8)\]')

  def test_slots(self):
    """Experts over four and rows over two: an exchange there, one back."""
    module = layer(eval_capacity_factor=1.0)
    many, hlo = on_mesh(module, *numbers(), data=2, expert=4)
    self.same(many, jax.jit(graded(module))(*numbers()))
    # Forward and backward.
    exchanges = re.findall(r'= .*? all-to-all(?:-start)?\(', hlo)
    self.assertLen(exchanges, 4)
    self.no_kernel_travels(hlo)
    self.assertNotIn('collective-permute', hlo)

  @parameterized.parameters(
    (dict(data=2, expert=2, model=2), dict(top_k=2)),
    (dict(data=2, expert=4), dict(router='gshard', second_expert='argmax')),
    (dict(data=8), dict(top_k=1)),
  )
  def test_rows(self, sizes, settings):
    """Nothing is dropped: what one device computes, sorted, and its gradient."""
    params, inputs = numbers()
    real = np.random.default_rng(0).random(inputs.shape[:2]) < 0.7
    module = layer(eval_capacity_factor=None, **settings)
    many, hlo = on_mesh(module, params, inputs, real, **sizes)
    self.same(many, jax.jit(graded(module, real))(params, inputs))
    np.testing.assert_array_equal(np.asarray(many[0][1])[~real], 0)
    self.no_kernel_travels(hlo)
    self.assertNotIn('all-to-all', hlo)
    if 'expert' not in sizes:
      self.assertEmpty(gathered(hlo))

  def test_rows_of_tokens_that_do_not_divide(self):
    """As while an answer is decoded: each device has whole tokens."""
    params, inputs = numbers()
    inputs = inputs[:3, :1]
    call = lambda params, inputs: layer(top_k=2, dispatch='rows').apply(
      {'params': params}, inputs, decode=True
    )
    one = jax.jit(call)(params, inputs)
    mesh = partition.make_mesh(data=2, expert=4)
    with partition.rules_of(mesh, partition.standard()):
      many = jax.jit(lambda *args: call(*args))(params, inputs)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5)

  def test_rows_of_experts_side_by_side(self):
    """Models on `branch`: each with its tokens, and none of another's."""
    params, inputs = numbers()
    both = jax.tree.map(lambda x: np.stack([x, 1.5 * x]), (params, inputs))
    module = layer(top_k=2, eval_capacity_factor=None)
    apart = [
      jax.jit(graded(module))(*jax.tree.map(lambda x, i=i: x[i], both))
      for i in range(2)
    ]
    mesh = partition.make_mesh(branch=2, data=2, expert=2)
    with partition.rules_of(mesh, partition.standard()):
      mapped = jax.vmap(graded(module), spmd_axis_name='branch')
      many = jax.jit(lambda *args: mapped(*args))(*both)
    for i, one in enumerate(apart):
      self.same(jax.tree.map(lambda x, i=i: x[i], many), one)

  def test_inputs_of_every_expert(self):
    """For statistics: each expert's rows, from all slices of the batch."""
    params, inputs = numbers()
    module = layer(top_k=2, eval_capacity_factor=None)

    def grams(params, inputs):
      found = {}

      def watch(call, arguments, keywords, context):
        if isinstance(context.module, moe.ExpertKernel):
          values, dispatch = arguments
          rows = dispatch.by_expert(values)
          rows = rows.reshape(len(rows), -1, rows.shape[-1])
          found[context.module.name] = jnp.einsum('eri,erj->eij', rows, rows)
        return call(*arguments, **keywords)

      with nn.intercept_methods(watch):
        module.apply({'params': params}, inputs)
      return found

    one = jax.jit(grams)(params, inputs)
    mesh = partition.make_mesh(data=2, expert=2, model=2)
    with partition.rules_of(mesh, partition.standard()):
      many = jax.jit(lambda *args: grams(*args))(params, inputs)
    self.same(many, one)

  @parameterized.parameters((4, 8), (6, 4))
  def test_experts_must_divide(self, experts, parts):
    """Else every device would hold all of them, and nobody would know."""
    mesh = partition.make_mesh(expert=parts)
    init = functools.partial(layer(num_experts=experts).init, jax.random.key(0))
    with partition.rules_of(mesh, partition.standard()):
      with self.assertRaisesRegex(
        errors.ConfigError,
        f'{experts} experts do not divide over {parts} parts',
      ):
        jax.eval_shape(init, jnp.ones((8, 8, 8)))


if __name__ == '__main__':
  absltest.main()
