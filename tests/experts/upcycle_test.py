# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Between dense and sparse models, and with fewer experts."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.experts import to_dense
from mergejax.experts import upcycle
from mergejax.experts import usage
from mergejax.nn import moe_config

SIZES = dict(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=12)
AT = 'decoder/layers_1/mlp'
NAMES = ('wi_0', 'wi_1', 'wo')


def build(**settings):
  return models.family_of(
    models.build(dict(model_type='lm', num_layers=2, **SIZES, **settings))
  )


def moe(**settings):
  return moe_config.MoeConfig(
    **{'num_experts': 3, 'group_size': 9, 'min_capacity': 1, **settings}
  )


def batch():
  rng = np.random.default_rng(0)
  targets = rng.integers(3, 20, (4, 9)).astype(np.int32)
  targets[0, 5:] = 0
  return {
    'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    'decoder_target_tokens': targets,
  }


def fresh(family, seed):
  params = jax.jit(family.init)(jax.random.key(seed))
  return jax.tree.map(np.array, params)


def logits(family, params):
  return jax.jit(family.logits)(params, batch())


def shuffled(block, seed):
  """An expert with its hidden units in another order."""
  order = np.random.default_rng(seed).permutation(12)
  return {n: k[order] if n == 'wo' else k[:, order] for n, k in block.items()}


def same(a, b):
  a, b = tree_lib.flatten(a), tree_lib.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)


class UpcycleTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.dense = build()
    cls.params = fresh(cls.dense, 0)

  @parameterized.parameters(
    dict(top_k=2, normalize_gates=True), dict(router='gshard')
  )
  def test_is_the_same_function_and_back_to_the_bit(self, **settings):
    config = moe(eval_capacity_factor=None, **settings)
    family, params = upcycle.upcycle(
      self.dense, self.params, config, key=jax.random.key(1)
    )
    real = batch()['decoder_target_tokens'] > 0
    np.testing.assert_allclose(
      logits(family, params)[real], logits(self.dense, self.params)[real],
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    back, found = to_dense.to_dense(family, params)
    self.assertEqual(back.config, self.dense.config)
    same(found, self.params)

  def test_scanned_layers(self):
    dense = build(scan_layers=True)
    params = fresh(dense, 0)
    family, sparse = upcycle.upcycle(
      dense, params, moe(decoder_layers=2), key=jax.random.key(1)
    )
    kernel = sparse['decoder']['decoder']['mlp']['expert']['wo']['kernel']
    specs = family.specs()
    self.assertEqual(
      specs['decoder/decoder/mlp/expert/wo/kernel'].shape, kernel.shape
    )
    same(to_dense.to_dense(family, sparse)[1], params)

  def test_a_student_has_fresh_blocks(self):
    """Of its own key, by the model's initialisation; the rest is the teacher's."""
    family, sparse = upcycle.upcycle(
      self.dense, self.params, moe(), key=jax.random.key(1)
    )
    fresh_of = lambda seed: tree_lib.flatten(
      to_dense.to_dense(family, sparse, how='fresh', key=jax.random.key(seed))[
        1
      ]
    )
    one, again, other = fresh_of(3), fresh_of(3), fresh_of(4)
    drawn = tree_lib.flatten(fresh(self.dense, 3))
    for path, leaf in tree_lib.flatten(self.params).items():
      np.testing.assert_array_equal(one[path], again[path])
      own = path.startswith(f'{AT}/')
      self.assertEqual(np.array_equal(one[path], leaf), not own, path)
      self.assertEqual(np.array_equal(one[path], other[path]), not own, path)
      if own:
        np.testing.assert_array_equal(one[path], drawn[path])
    # What would say nothing is refused.
    for more in (dict(align=True), dict(usage={})):
      with self.assertRaisesRegex(errors.ConfigError, 'nothing of the experts'):
        to_dense.to_dense(family, sparse, how='fresh', **more)

  def test_branch_train_mix(self):
    trained = [fresh(self.dense, seed) for seed in (0, 1, 2)]
    family, params = upcycle.branch_train_mix(
      self.dense, trained, moe(top_k=2), key=jax.random.key(1)
    )
    leaves = tree_lib.flatten(params)
    parts = [tree_lib.flatten(tree) for tree in trained]
    for e in range(3):
      np.testing.assert_array_equal(
        leaves[f'{AT}/expert/wi_0/kernel'][e], parts[e][f'{AT}/wi_0/kernel']
      )
    for path in (
      'decoder/layers_0/mlp/wo/kernel',
      'decoder/logits_dense/kernel',
    ):
      mean = np.mean([own[path].astype(np.float64) for own in parts], 0)
      np.testing.assert_allclose(leaves[path], mean, rtol=1e-6)
    self.assertEqual(family.config.moe.top_k, 2)

  @parameterized.named_parameters(
    ('number', lambda d, p: upcycle.branch_train_mix(
      d, [p, p], moe(), key=jax.random.key(0)), 'num_experts=2'),
    ('shape', lambda d, p: upcycle.upcycle(
      build(), {**p, 'decoder': {**p['decoder'], 'layers_1': {
        **p['decoder']['layers_1'], 'mlp': jax.tree.map(
          lambda x: x[:4], p['decoder']['layers_1']['mlp'])}}},
      moe(), key=jax.random.key(0)), 'layers_1/mlp/wi_0/kernel'),
    ('layer', lambda d, p: upcycle.upcycle(
      d, {**p, 'decoder': {n: x for n, x in p['decoder'].items()
                           if n != 'layers_1'}},
      moe(), key=jax.random.key(0)), 'no decoder/layers_1/'),
    ('sparse', lambda d, p: to_dense.to_dense(d, p), 'no experts'),
  )  # fmt: skip
  def test_message(self, call, words):
    with self.assertRaisesRegex(errors.UserError, words):
      call(self.dense, self.params)


class ExpertsChooseTest(absltest.TestCase):
  def test_a_dense_block_gives_what_all_experts_of_a_token_give(self):
    """Of an even router each has the weight 1/4, and a token meets two."""
    config = moe(
      num_experts=4, router='experts_choose', allow_noncausal=True,
      eval_capacity_factor=2.0,
    )  # fmt: skip
    dense = build()
    params = fresh(dense, 0)
    family, sparse = upcycle.upcycle(
      dense, params, config, key=jax.random.key(1)
    )
    router = sparse['decoder']['layers_1']['mlp']['router']['router_weights']
    router['w']['kernel'] = np.zeros_like(router['w']['kernel'])
    told = usage.measure(family, sparse, [batch()])
    # Four of nine tokens in each of four groups, 32 of the 36 real.
    np.testing.assert_allclose(told[AT].experts, 4 * 4 * 4 / 32, rtol=1e-6)
    _, found = to_dense.to_dense(family, sparse, usage=told)
    path = f'{AT}/wo/kernel'
    np.testing.assert_allclose(
      tree_lib.flatten(found)[path], 0.5 * tree_lib.flatten(params)[path],
      rtol=1e-5,
    )  # fmt: skip


class SparseTest(parameterized.TestCase):
  """What is measured of a sparse model, and what follows from it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = moe(num_experts=4, eval_capacity_factor=None)
    dense = build()
    cls.family, cls.params = upcycle.upcycle(
      dense, fresh(dense, 0), config, key=jax.random.key(3)
    )
    cls.params = jax.tree.map(np.array, cls.params)
    experts = cls.params['decoder']['layers_1']['mlp']['expert']
    rng = np.random.default_rng(0)
    for name in experts:
      shape = experts[name]['kernel'].shape
      experts[name]['kernel'] = rng.normal(size=shape).astype(np.float32)
    router = cls.params['decoder']['layers_1']['mlp']['router']
    router['router_weights']['w']['kernel'] *= 50
    cls.usage = usage.measure(cls.family, cls.params, [batch()])
    cls.logits = logits(cls.family, cls.params)

  def kernels(self, params, name='wi_0'):
    return tree_lib.flatten(params)[f'{AT}/expert/{name}/kernel']

  def test_usage(self):
    self.assertEqual(list(self.usage), [AT])
    outputs = jax.jit(
      lambda p: self.family.apply(self.family.variables(p), batch()).metrics
    )(self.params)
    load = [outputs[f'moe/expert_load/{e}'] for e in range(4)]
    np.testing.assert_allclose(self.usage[AT].load, load, rtol=1e-5)
    np.testing.assert_allclose(
      self.usage[AT].gate, outputs['moe/router_confidence'], rtol=1e-5
    )

  def test_to_dense(self):
    make = functools.partial(
      to_dense.to_dense, self.family, self.params, usage=self.usage
    )
    load, gate, experts = self.usage[AT]
    self.assertEqual(experts, 1)
    for how, weights in (
      ('mean', np.ones(4) / 4), ('load', load), ('argmax', load == load.max())
    ):  # fmt: skip
      found = tree_lib.flatten(make(how=how)[1])
      for name, scale in (('wi_0', 1.0), ('wo', gate)):
        wanted = np.tensordot(weights, self.kernels(self.params, name), 1)
        np.testing.assert_allclose(
          found[f'{AT}/{name}/kernel'], scale * wanted, rtol=1e-4, atol=1e-6
        )

  def test_experts_with_shuffled_units_are_aligned(self):
    block = {n: self.kernels(self.params, n)[0] for n in NAMES}
    found = usage.aligned(block, shuffled(block, 1))
    for name in block:
      np.testing.assert_array_equal(found[name], block[name])

  def replaced(self, blocks):
    """The parameters with these experts."""
    leaves = dict(tree_lib.flatten(self.params))
    for n in NAMES:
      leaves[f'{AT}/expert/{n}/kernel'] = np.stack([b[n] for b in blocks])
    return tree_lib.unflatten(leaves)

  def test_shuffled_copies_become_one_block(self):
    own = {n: self.kernels(self.params, n)[0] for n in NAMES}
    params = self.replaced([own, *(shuffled(own, s) for s in (1, 2, 3))])
    _, found = to_dense.to_dense(self.family, params, align=True)
    found = tree_lib.flatten(found)
    for name in NAMES:
      np.testing.assert_allclose(
        found[f'{AT}/{name}/kernel'], own[name], rtol=1e-6
      )

  def test_experts_are_merged_into_their_nearest(self):
    a, b = ({n: self.kernels(self.params, n)[e] for n in NAMES} for e in (0, 1))
    near_a, near_b = ({n: k + 0.01 for n, k in x.items()} for x in (a, b))
    params = self.replaced([a, b, shuffled(near_b, 1), shuffled(near_a, 2)])
    load = np.array([0.4, 0.3, 0.1, 0.2])
    told = {AT: usage.Usage(load, 0.5, 1.0)}
    _, found = usage.fewer(self.family, params, 2, told)
    for name in NAMES:
      kernels = self.kernels(found, name)
      for e, (one, other, w) in enumerate(((a, near_a, 0.2), (b, near_b, 0.1))):
        mean = (load[e] * one[name] + w * other[name]) / (load[e] + w)
        np.testing.assert_allclose(kernels[e], mean, rtol=1e-5, atol=1e-6)

  @parameterized.parameters('prune', 'merge')
  def test_fewer(self, how):
    family, params = usage.fewer(
      self.family, self.params, 2, self.usage, how=how
    )
    self.assertEqual(family.config.moe.num_experts, 2)
    kept = np.sort(np.argsort(-self.usage[AT].load)[:2])
    router = f'{AT}/router/router_weights/w/kernel'
    flat, given = map(tree_lib.flatten, (params, self.params))
    np.testing.assert_array_equal(flat[router], given[router][:, kept])
    exact = np.array_equal(
      self.kernels(params), self.kernels(self.params)[kept]
    )
    self.assertEqual(exact, how == 'prune')

  def test_as_many_as_there_are_change_nothing(self):
    family, params = usage.fewer(self.family, self.params, 4, self.usage)
    self.assertEqual(family.config, self.family.config)
    same(params, self.params)

  def test_matched_experts(self):
    """Put in another order, units shuffled, they find their places again."""
    order = np.array([2, 0, 3, 1])
    units = np.random.default_rng(1).permutation(12)
    leaves = dict(tree_lib.flatten(self.params))
    for name in ('wi_0', 'wi_1', 'wo'):
      path = f'{AT}/expert/{name}/kernel'
      own = leaves[path][order]
      leaves[path] = own[:, units] if name == 'wo' else own[..., units]
    router = f'{AT}/router/router_weights/w/kernel'
    leaves[router] = leaves[router][:, order]
    other = tree_lib.unflatten(leaves)
    np.testing.assert_allclose(
      logits(self.family, other), self.logits, rtol=1e-4, atol=1e-4
    )
    same(usage.matched(self.family, self.params, other), self.params)

  @parameterized.named_parameters(
    ('many', dict(count=5), '5 experts'),
    ('how', dict(count=2, how='drop'), 'prune'),
    ('layer', dict(count=2, usage={}), AT),
  )
  def test_message(self, settings, words):
    settings = {'usage': self.usage, **settings}
    with self.assertRaisesRegex(errors.UserError, words):
      usage.fewer(self.family, self.params, **settings)

  @parameterized.named_parameters(
    ('reference', lambda f, own, other: usage.matched(f, other, own)),
    ('params', lambda f, own, other: usage.matched(f, own, other)),
    ('fewer', lambda f, own, other: usage.fewer(f, other, 2, {})),
    ('dense', lambda f, own, other: to_dense.to_dense(f, other)),
  )
  def test_parameters_of_another_model(self, call):
    leaves = dict(tree_lib.flatten(self.params))
    del leaves[f'{AT}/router/router_weights/w/kernel']
    words = f'(?s)of the sparse model .*- {AT}/router'
    with self.assertRaisesRegex(errors.StructureError, words):
      call(self.family, self.params, tree_lib.unflatten(leaves))


if __name__ == '__main__':
  absltest.main()
