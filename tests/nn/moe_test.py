# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The sparse layer: goldens, its two forms, and laws."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
from reference import routing as oracle
import tiers

from mergejax.core import errors
from mergejax.nn import grouped
from mergejax.nn import layers
from mergejax.nn import moe
from mergejax.nn import moe_config
from mergejax.nn import moe_metrics

GATED = ('gelu', 'linear')
ROUTERS = {
  'top1_mask': dict(top_k=1),
  'top2_mask': dict(top_k=2, batch_prioritised=True),
  'top2_scatter': dict(top_k=2, batch_prioritised=True),
  'experts_choose': dict(router='experts_choose'),
}


def config(**settings):
  return moe_config.MoeConfig(
    **{'num_experts': 4, 'group_size': 8, 'min_capacity': 1, **settings}
  )


def layer(hidden=16, activations=GATED, **settings):
  decoder = settings.pop('decoder', False)
  return moe.MoeLayer(config(**settings), hidden, activations, decoder=decoder)


def called(module, params, *args, **kwargs):
  """`(outputs, what was left behind)`, compiled."""
  call = lambda params, *args: module.apply(
    {'params': params}, *args, mutable=[moe_metrics.COLLECTION], **kwargs
  )
  found, left = jax.jit(call)(params, *args)
  return found, left[moe_metrics.COLLECTION]


def numbers():
  """Parameters and inputs of the golden layer."""
  arrays = goldens.load('moe_flaxformer')
  return goldens.subtree(arrays, 'layer/params/'), arrays['layer/inputs']


def expert_outputs(params, inputs):
  """`[experts, batch, length, embed]` of every expert for every token."""
  found = []
  for e in range(4):
    own = {k: {'kernel': v['kernel'][e]} for k, v in params['expert'].items()}
    mlp = layers.Mlp(16, GATED)
    found.append(mlp.apply({'params': own}, inputs))
  return np.stack(found)


@tiers.slow('test_layer[157]')
class GoldensTest(parameterized.TestCase):
  @parameterized.product(tag=sorted(ROUTERS), factor=(1.0, 2.0))
  def test_layer(self, tag, factor):
    arrays = goldens.load('moe_flaxformer')
    form = 'rows' if tag.endswith('scatter') else 'padded'
    module = layer(eval_capacity_factor=factor, dispatch=form, **ROUTERS[tag])
    found, left = called(module, *numbers())
    at = f'layer/{tag}/cf{factor}'
    np.testing.assert_allclose(
      found, arrays[f'{at}/outputs'], rtol=1e-4, atol=1e-5
    )
    names = [n for n in arrays if n.startswith(f'{at}/metric/')]
    self.assertLen(names, 5)
    for name in names:
      np.testing.assert_allclose(
        left[name.rpartition('/')[2]], arrays[name], rtol=1e-4, atol=1e-5,
        err_msg=name,
      )  # fmt: skip

  def test_names(self):
    made = jax.eval_shape(
      layer().init, jax.random.key(0), jnp.zeros((2, 4, 8))
    )['params']
    params, _ = numbers()
    self.assertEqual(
      jax.tree.map(lambda x: x.shape, made),
      jax.tree.map(lambda x: x.shape, params),
    )


class FormsTest(parameterized.TestCase):
  """Rows and slots: the same numbers and gradients, and those of the formula."""

  @parameterized.named_parameters(
    ('room', dict(eval_capacity_factor=1.0)),
    ('padding', dict(eval_capacity_factor=1.0), True),
    ('dropless', dict(eval_capacity_factor=None)),
    ('gshard', dict(router='gshard', second_expert='argmax')),
  )
  def test_agree(self, settings, padded=False):
    params, inputs = numbers()
    real = None
    if padded:
      real = np.random.default_rng(0).random(inputs.shape[:2]) < 0.7
    found = {}
    for form in ('rows', 'padded'):
      module = layer(top_k=2, dispatch=form, **settings)

      def loss(params, inputs, module=module):
        outputs, left = module.apply(
          {'params': params}, inputs, real, mutable=[moe_metrics.COLLECTION]
        )
        left = left[moe_metrics.COLLECTION]
        aux = left['auxiliary_loss'] + left['router_z_loss']
        return jnp.sum(jnp.square(outputs)) + aux, outputs

      grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
      found[form] = jax.jit(grad)(params, inputs)
    for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
    if real is not None:
      outputs = np.asarray(found['rows'][0][1])
      np.testing.assert_array_equal(outputs[~real], 0)

  def test_without_bound_it_is_the_formula(self):
    params, inputs = numbers()
    found, left = called(
      layer(top_k=2, eval_capacity_factor=None), params, inputs
    )
    logits = inputs @ params['router']['router_weights']['w']['kernel']
    pairs = oracle.tokens_choose(oracle.softmax(logits.reshape(-1, 4)), 2, None)
    outputs = expert_outputs(params, inputs).reshape(4, -1, 8)
    wanted = oracle.combined(pairs, len(outputs[0]), outputs)
    np.testing.assert_allclose(
      found.reshape(-1, 8), wanted, rtol=1e-4, atol=1e-5
    )
    self.assertEqual(float(left['dropped_pairs']), 0)
    self.assertEqual(float(left['fraction_tokens_left_behind']), 0)

  @parameterized.parameters('rows', 'padded')
  def test_gradients_are_those_of_the_formula(self, form):
    params, inputs = numbers()
    module = layer(top_k=2, eval_capacity_factor=None, dispatch=form)
    given = np.random.default_rng(0).normal(size=inputs.shape)
    given = given.astype(np.float32)

    def plain(params, inputs):
      router = params['router']['router_weights']['w']['kernel']
      p = jax.nn.softmax(inputs @ router)
      weights = jnp.where(p >= jnp.sort(p)[..., -2:-1], p, 0)
      kernel = lambda name: params['expert'][name]['kernel']
      into = lambda name: jnp.einsum('bld,edf->eblf', inputs, kernel(name))
      hidden = jax.nn.gelu(into('wi_0')) * into('wi_1')
      found = jnp.einsum('eblf,efd->ebld', hidden, kernel('wo'))
      return jnp.einsum('ebld,ble->bld', found, weights)

    sparse = lambda params, inputs: module.apply({'params': params}, inputs)
    pull = lambda fn: jax.jit(
      lambda *at: jax.vjp(fn, *at)[1](jnp.asarray(given))
    )(params, inputs)
    for a, b in zip(*map(jax.tree.leaves, (pull(sparse), pull(plain)))):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

  def test_grouped_products(self):
    """Groups of no row, of one, of more than a block; rows behind them."""
    rng = np.random.default_rng(0)
    sizes = np.array([0, 1, 300, 5], np.int32)
    rows = rng.normal(size=(320, 3)).astype(np.float32)
    rows[306:] = 0
    kernels = rng.normal(size=(4, 3, 2)).astype(np.float32)
    of_row = np.repeat(np.arange(4), sizes)
    given = rng.normal(size=(320, 2)).astype(np.float32)

    def blocked(rows, kernels):
      return grouped.grouped_dot(rows, kernels, jnp.asarray(sizes))

    def plain(rows, kernels):
      found = jnp.einsum('ri,rio->ro', rows[:306], kernels[of_row])
      return jnp.pad(found, ((0, 14), (0, 0)))

    def both(fn):
      outputs, pull = jax.vjp(fn, rows, kernels)
      return outputs, *pull(given)

    # The products are made in float32 on the CPU, whatever their order.
    wanted = jax.jit(lambda: both(plain))()
    for a, b in zip(jax.jit(lambda: both(blocked))(), wanted, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    stacked = jax.jit(jax.vmap(blocked))(
      np.stack([rows, 2 * rows]), np.stack([kernels, kernels])
    )
    np.testing.assert_allclose(stacked[1], 2 * stacked[0], rtol=1e-5)
    np.testing.assert_allclose(stacked[0], wanted[0], rtol=1e-4, atol=1e-5)


class LawsTest(parameterized.TestCase):
  def test_equal_experts_make_the_dense_function(self):
    params, inputs = numbers()
    same = {
      name: {'kernel': np.stack([leaf['kernel'][0]] * 4)}
      for name, leaf in params['expert'].items()
    }
    params = {**params, 'expert': same}
    module = layer(top_k=2, normalize_gates=True, eval_capacity_factor=None)
    found, _ = called(module, params, inputs)
    np.testing.assert_allclose(
      found, expert_outputs(params, inputs)[0], rtol=1e-4, atol=1e-5
    )

  def test_order_of_experts_does_not_matter(self):
    params, inputs = numbers()
    order = np.array([2, 0, 3, 1])
    other = {
      'expert': jax.tree.map(lambda x: x[order], params['expert']),
      'router': jax.tree.map(lambda x: x[:, order], params['router']),
    }
    for settings in ({'top_k': 2}, {'router': 'experts_choose'}):
      module = layer(eval_capacity_factor=1.0, **settings)
      a, left_a = called(module, params, inputs)
      b, left_b = called(module, other, inputs)
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(
        left_a['expert_load'][order], left_b['expert_load'], rtol=1e-6
      )

  def test_later_tokens_do_not_change_earlier_ones(self):
    params, inputs = numbers()
    other = inputs.copy()
    other[:, 9:] = 7.0
    for settings in (dict(eval_capacity_factor=None), dict(min_capacity=8)):
      module = layer(top_k=2, decoder=True, **settings)
      a, _ = called(module, params, inputs)
      b, _ = called(module, params, other)
      np.testing.assert_allclose(a[:, :8], b[:, :8], rtol=1e-5, atol=1e-6)
      self.assertGreater(np.abs(a - b)[:, 9:].max(), 0.1)

  def test_decoding_drops_nothing_and_needs_no_groups(self):
    params, inputs = numbers()
    module = layer(top_k=2, eval_capacity_factor=None)
    together, _ = called(module, params, inputs)
    one, left = called(
      layer(top_k=2, eval_capacity_factor=1.0), params, inputs[:3, :1],
      decode=True,
    )  # fmt: skip
    np.testing.assert_allclose(one, together[:3, :1], rtol=1e-4, atol=1e-5)
    self.assertEqual(float(left['dropped_pairs']), 0)

  def test_odd_batches_are_padded(self):
    params, inputs = numbers()
    module = layer(top_k=1, eval_capacity_factor=None)
    whole, _ = called(module, params, inputs[:1, :8])
    part, left = called(module, params, inputs[:1, :7])
    np.testing.assert_allclose(part, whole[:, :7], rtol=1e-5, atol=1e-6)
    self.assertEqual(float(left['fraction_tokens_left_behind']), 0)

  @parameterized.parameters(dict(jitter=0.3), dict(dropout_rate=0.5))
  def test_training(self, **settings):
    """Its capacity; jitter and dropout, each drawn by key."""
    params, inputs = numbers()
    module = layer(
      train_capacity_factor=1.0, eval_capacity_factor=None, **settings
    )

    @jax.jit
    def train(key):
      found, left = module.apply(
        {'params': params}, inputs, deterministic=False,
        rngs={'dropout': key}, mutable=[moe_metrics.COLLECTION],
      )  # fmt: skip
      return found, left[moe_metrics.COLLECTION]['dropped_pairs']

    keys = jax.random.split(jax.random.key(0), 2)
    (first, dropped), (again, _) = train(keys[0]), train(keys[0])
    other, _ = train(keys[1])
    np.testing.assert_array_equal(first, again)
    self.assertGreater(np.abs(first - other).max(), 0)
    self.assertGreater(float(dropped), 0)

  def test_experts_may_have_a_dropout_of_their_own(self):
    """That of the model where theirs is None; 0 is one too."""
    params, inputs = numbers()

    def moves(own):
      module = dataclasses.replace(layer(dropout_rate=own), dropout_rate=0.5)
      train = jax.jit(
        lambda key: module.apply(
          {'params': params}, inputs, deterministic=False,
          rngs={'dropout': key},
        )
      )  # fmt: skip
      one, other = (train(jax.random.key(seed)) for seed in (0, 1))
      return bool(np.any(one != other))

    self.assertEqual([moves(own) for own in (None, 0.0)], [True, False])

  def test_jitter_is_of_inputs(self):
    """Of one feature a token it scales all its logits alike, by 0.7 to 1.3."""
    module = moe.Router(config(jitter=0.3))
    inputs = 3 * jnp.tile(jnp.eye(8), (4, 1))[None]
    rngs = {'dropout': jax.random.key(1)}
    variables = module.init(jax.random.key(0), inputs)

    def scale(inputs):
      plain = module.apply(variables, inputs)
      noisy = module.apply(variables, inputs, deterministic=False, rngs=rngs)
      return np.asarray(noisy / plain)[0]

    of_one = scale(inputs)
    np.testing.assert_allclose(of_one, of_one[:, :1] + 0 * of_one, rtol=1e-4)
    self.assertBetween(of_one.min(), 0.7, 0.8)
    self.assertBetween(of_one.max(), 1.2, 1.3)
    # Every feature has noise of its own: of many they are mixed.
    of_all = scale(jnp.ones_like(inputs))
    self.assertGreater(np.abs(of_all - of_all[:, :1]).max(), 0.01)

  @parameterized.parameters('mask', 'scatter')
  def test_metrics_are_of_real_tokens(self, style):
    """Also where the padding of others takes room."""
    params, inputs = numbers()
    real = np.ones(inputs.shape[:2], bool)
    real[:, 3:] = False
    module = layer(legacy_padding=style, eval_capacity_factor=None)
    _, left = called(module, params, inputs, real)
    self.assertEqual(float(left['fraction_tokens_left_behind']), 0)
    self.assertEqual(float(left['dropped_pairs']), 0)
    self.assertEqual(float(left['experts_per_token']), 1)

  def test_initial_scale(self):
    module = moe.MoeLayer(config(), 4096, ('relu',), init_scale=0.1)
    made = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 64)))
    kernels = made['params']['expert']
    for name, inputs in (('wi', 64), ('wo', 4096)):
      np.testing.assert_allclose(
        np.std(kernels[name]['kernel']), np.sqrt(0.1 / inputs), rtol=0.02
      )
    router = made['params']['router']['router_weights']['w']['kernel']
    self.assertLess(abs(np.std(router) / 0.02 - 1), 0.2)

  def test_bfloat16_experts_have_a_float32_router(self):
    params, inputs = numbers()
    wide = layer(top_k=2)
    narrow = dataclasses.replace(wide, dtype='bfloat16')
    wide, left = called(wide, params, inputs)
    found, narrow_left = called(narrow, params, inputs)
    self.assertEqual(found.dtype, jnp.bfloat16)
    np.testing.assert_allclose(found.astype(np.float32), wide, atol=0.5)
    for name in ('router_z_loss', 'auxiliary_loss', 'router_entropy'):
      self.assertEqual(float(narrow_left[name]), float(left[name]))


class ErrorsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('mixed', lambda: moe_config.layout('mixed', 4, 3), 'evenly'),
    ('many', lambda: config(decoder_layers=5).sparse_layers(4, decoder=True),
     'there are 4'),
    ('router', lambda: config(router='token_choose'), 'tokens_choose'),
    ('k', lambda: config(top_k=5), '5 experts'),
    ('factor', lambda: config(train_capacity_factor=0), 'train_capacity_factor'),
    ('no bound', lambda: config(
      router='experts_choose', eval_capacity_factor=None), 'must be told'),
    ('bool', lambda: config(normalize_gates='false'), 'must be true or false'),
    ('activation', lambda: layer(activations=('gleu',)), 'gelu'),
    ('causal', lambda: layer(router='experts_choose', decoder=True),
     'allow_noncausal'),
    ('too few', lambda: layer(router='experts_choose',
                              eval_capacity_factor=8.0), 'smaller capacity'),
  )  # fmt: skip
  def test_message(self, make, words):
    with self.assertRaisesRegex(errors.ConfigError, words):
      found = make()
      if isinstance(found, nn.Module):
        jax.eval_shape(
          functools.partial(found.init, jax.random.key(0)), jnp.ones((2, 4, 8))
        )

  def test_layers_that_left_nothing_are_told_of(self):
    with self.assertRaisesRegex(errors.StructureError, 'must lift it too'):
      moe_metrics.totals(config(), {'decoder': {'inputs_of_x': np.ones(2)}})

  def test_strict_groups_are_those_of_batches(self):
    """Parameters are made with an example, whose groups are small."""
    module = layer(strict_group_size=True, eval_capacity_factor=None)
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 4, 8)))[
      'params'
    ]
    apply = lambda params, inputs: module.apply({'params': params}, inputs)
    found = jax.eval_shape(apply, made, jnp.ones((8, 4, 8)))
    self.assertEqual(found.shape, (8, 4, 8))
    with self.assertRaisesRegex(errors.ConfigError, 'Groups have 4 tokens'):
      jax.eval_shape(apply, made, jnp.ones((4, 4, 8)))

  def test_a_decoder_may_be_allowed_to_look_ahead(self):
    params, inputs = numbers()
    options = dict(router='experts_choose', allow_noncausal=True, decoder=True)
    found, _ = called(layer(**options), params, inputs)
    self.assertTrue(np.all(np.isfinite(found)))

  def test_layouts(self):
    kinds = 'bottom', 'middle', 'mixed', 'top'
    for kind, count, sparse, *row in goldens.load('moe_flaxformer')[
      'layout/table'
    ].tolist():
      found = moe_config.layout(kinds[kind], count, sparse)
      self.assertEqual([int(each) for each in found], row[:count])


if __name__ == '__main__':
  absltest.main()
