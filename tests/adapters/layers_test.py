# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Laws of adapters of linear maps, on every kind of model."""

import functools
import re

from absl.testing import absltest
from absl.testing import parameterized
import environments
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.adapters import sites
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import layer_stacks
from mergejax.training import step as step_lib

ADAPTERS = {
  'lora': mj.adapters.lora(rank=3, alpha=6, targets=('.*/kernel',)),
  'ia3': mj.adapters.ia3(),
  'bottleneck': mj.adapters.bottleneck(width=3),
}
FOLDED = ('lora', 'ia3')


@functools.cache
def program(kind, name=None, **changes):
  """`(family, base, compiled logits)`, of the adapter of a name if there is one."""
  family, base = small_adapted.build(kind, **changes)
  if name is not None:
    family = mj.adapters.adapt(family, ADAPTERS[name])
  return family, base, jax.jit(family.logits)


def each(*kinds):
  return parameterized.parameters(*((k, n) for k in kinds for n in ADAPTERS))


@tiers.slow('test_fresh_.*[45]', 'test_scanned_.*[123]', 'test_sharded_.*[12]')
class LawsTest(parameterized.TestCase):
  @each('t5', 'lm')
  def test_fresh_is_the_base_and_folded_is_applied(self, kind, name):
    adapted, base, logits = program(kind, name)
    _, _, plain = program(kind)
    batch = small_adapted.batch()
    fresh = adapted.start(base, jax.random.key(1))
    before = plain(base, batch)
    np.testing.assert_array_equal(logits(fresh, batch), before)
    # The base is there as it was, under its own names.
    jax.tree.map(np.testing.assert_array_equal, adapted.split(fresh)[0], base)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    applied = logits(params, batch)
    self.assertGreater(float(jnp.max(jnp.abs(before - applied))), 0.1)
    if name in FOLDED:
      folded = mj.adapters.fold(adapted, params)
      self.assertEmpty(tree.difference(tree.specs(base), tree.specs(folded)))
      np.testing.assert_allclose(
        plain(folded, batch), applied, rtol=2e-4, atol=2e-4
      )

  @each('t5', 'lm')
  def test_scanned_equals_one_by_one(self, kind, name):
    adapted, base, logits = program(kind, name)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    batch = small_adapted.batch()
    changes = dict(scan_layers=True, param_scan_axis=int(kind == 't5'))
    changes['remat_policy'] = 'full'
    stacked, other, answer = program(kind, name, **changes)
    laid = tree.unflatten(
      layer_stacks.restack(tree.flatten(params), stacked.config)
    )
    self.assertEmpty(tree.difference(stacked.specs(), tree.specs(laid)))
    np.testing.assert_allclose(
      answer(laid, batch), logits(params, batch), rtol=2e-4, atol=2e-4
    )
    if name in FOLDED:
      folded = mj.adapters.fold(stacked, laid)
      expected = layer_stacks.restack(
        tree.flatten(mj.adapters.fold(adapted, params)), stacked.config
      )
      for path, leaf in tree.flatten(folded).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-6)
    if name == 'lora':
      _, _, plain = program(kind, **changes)
      fresh = stacked.start(other, jax.random.key(1))
      np.testing.assert_array_equal(answer(fresh, batch), plain(other, batch))

  @parameterized.parameters(*ADAPTERS)
  def test_sharded_equals_unsharded(self, name):
    adapted, base, plain = program('t5', name)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    batch = small_adapted.batch()
    mesh, rules = partition.make_mesh(data=4, model=2), partition.standard()
    axes = {path: spec.axes for path, spec in adapted.specs().items()}
    layout = partition.shardings(mesh, params, axes, rules)
    # A leaf that follows the hidden layer is spread as it is.
    spread = [
      p for p, place in tree.flatten(layout).items()
      if 'model' in place.spec and p in adapted.adapter_specs
    ]  # fmt: skip
    self.assertEqual(len(spread) > 5, name != 'bottleneck')

    def logits(params, batch):
      with partition.rules_of(mesh, rules):
        return adapted.logits(params, batch)

    found = jax.jit(logits)(jax.device_put(params, layout), batch)
    np.testing.assert_allclose(
      found, plain(params, batch), rtol=2e-4, atol=2e-4
    )

  def test_programs_of_two_adapters_are_two(self):
    keys = {program('t5', name)[0].program_key for name in (None, *ADAPTERS)}
    self.assertLen(keys, 1 + len(ADAPTERS))
    again = mj.adapters.adapt(program('t5')[0], mj.adapters.ia3())
    self.assertIn(again.program_key, keys)

  def test_lists_of_answers_are_scored_with_it(self):
    adapted, base, _ = program('t5', 'ia3')
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    answers, batch = np.int32([[3, 1, 0], [4, 5, 1]]), small_adapted.batch(2)
    scores = lambda family, params: jax.jit(family.answer_logits(answers))(
      params, batch
    )
    np.testing.assert_allclose(
      scores(adapted, params),
      scores(adapted.plain, mj.adapters.fold(adapted, params)),
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip

  def test_answers_of_the_adapted_model(self):
    # Step by step with a cache, two answers to a row, as the folded model.
    adapted, base, _ = program('t5', 'lora')
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    folded = mj.adapters.fold(adapted, params)
    batch = small_adapted.batch(4)
    tokens = jnp.arange(8, dtype=jnp.int32)
    decode = lambda family, params: small_adapted.decoded(
      family, params, batch, tokens, 3
    )
    np.testing.assert_allclose(
      jax.jit(lambda p: decode(adapted, p))(params),
      jax.jit(lambda p: decode(adapted.plain, p))(folded),
      rtol=5e-4, atol=5e-4,
    )  # fmt: skip


# A product that is as large as a kernel of the feed-forward blocks.
_GRADIENT = re.compile(r'= f32\[(?:32,128|128,32)\]\S* (?:dot|custom-call)\(')


class TrainingTest(parameterized.TestCase):
  def test_what_is_frozen_costs_no_memory(self):
    family, base = small_adapted.build(
      'lm', emb_dim=32, mlp_dim=128, num_layers=1, vocab_size=64
    )
    batch = small_adapted.batch(2)
    memory, gradients, states = {}, {}, {}
    optimizer = optax.sgd(0.1, momentum=0.9)
    adapted = mj.adapters.adapt(family, mj.adapters.lora(rank=2))
    for name, model in (('full', family), ('lora', adapted)):
      step = step_lib.make_step(model, optimizer)
      params = base if name == 'full' else model.start(base, jax.random.key(1))
      states[name] = step.init(params, jax.random.key(0))
      update = jax.jit(step.update, donate_argnums=(0,))
      compiled = update.lower(states[name], batch).compile()
      memory[name] = compiled.memory_analysis()
      found = _GRADIENT.findall(compiled.as_text())
      gradients[name] = len(found)
      if name == 'lora':
        trained, _ = compiled(jax.tree.map(jnp.copy, states[name]), batch)
    size = lambda params: sum(x.nbytes for x in jax.tree.leaves(params))
    whole, own = size(base), size(adapted.split(states['lora'].params)[1])
    # Moments of the adapter alone; arguments are the base and those.
    self.assertEqual(size(states['lora'].opt_state), own)
    rest = sum(x.nbytes for x in batch.values()) // 2 + 4096
    at = memory['lora'].argument_size_in_bytes
    self.assertBetween(at, whole + 2 * own, whole + 2 * own + rest)
    # No product of the program is the gradient of a kernel, as those of full
    # training are, and what is computed on the way is less.
    lora, full = (memory[n].temp_size_in_bytes for n in ('lora', 'full'))
    self.assertLess(lora, full)
    self.assertEqual(gradients['full'], 3)
    self.assertEqual(gradients['lora'], 0)
    # What is donated is where the results lie: no second copy of the base.
    self.assertGreater(memory['lora'].alias_size_in_bytes, whole + 2 * own)
    before = tree.flatten(states['lora'].params)
    for path, leaf in tree.flatten(trained.params).items():
      same = np.array_equal(leaf, before[path])
      self.assertEqual(same, not path.endswith('lora_b'), path)

  def test_trainer_trains_the_adapter_alone(self):
    family, base = small_adapted.build('lm', num_layers=1, dropout_rate=0.1)
    adapter = mj.adapters.lora(rank=2, dropout=0.5)
    adapted = mj.adapters.adapt(family, adapter)
    self.enter_context(environments.one_device())
    trainer = mj.training.Trainer(adapted, optax.sgd(0.1))
    params = adapted.start(base, jax.random.key(1))
    batches = [small_adapted.batch()] * 3
    state = trainer.fit(batches, steps=3, params=params)
    kept, own = adapted.split(state.params)
    jax.tree.map(np.testing.assert_array_equal, kept, base)
    for path, leaf in tree.flatten(own).items():
      self.assertFalse(np.array_equal(leaf, tree.flatten(params)[path]), path)

  def test_dropout_differs_by_layer_and_step(self):
    family, base = small_adapted.build('lm', scan_layers=True)
    adapter = mj.adapters.lora(dropout=0.5, targets=r'.*/wi_0/kernel')
    adapted = mj.adapters.adapt(family, adapter)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    self.assertEqual(adapted.rng_streams(train=True), ('dropout',))
    self.assertEqual(adapted.rng_streams(train=False), ())
    run = jax.jit(
      lambda key, train: adapted.call(
        adapted.variables(params), small_adapted.batch(2), train=train,
        rngs={'dropout': key},
      )[0],
      static_argnums=1,
    )  # fmt: skip
    one, other = jax.random.key(0), jax.random.key(1)
    answers = run(one, False)
    np.testing.assert_array_equal(answers, run(other, False))
    trained = run(one, True)
    np.testing.assert_array_equal(trained, run(one, True))
    self.assertFalse(np.array_equal(trained, run(other, True)))
    self.assertFalse(np.array_equal(trained, answers))


class Scaled(nn.Module):
  """A stranger's linear map, whose kernel is called otherwise."""

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.normal(), (x.shape[-1], 5))
    return 3 * (x @ weight)


class Mine(nn.Module):
  """A stranger's model: flax's layers, and one of its own."""

  @nn.compact
  def __call__(self, x):
    x = nn.DenseGeneral((2, 3), name='heads')(x)
    x = nn.DenseGeneral(4, axis=(-2, -1), name='joined')(x)
    x = nn.relu(x)
    x = Scaled(name='scaled')(x)
    return nn.Dense(3, name='head')(x)


def _describe(module, method, arguments, /):
  del module, method
  return [('weight', arguments[0])]


class OwnModuleTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.batch = {
      'inputs': rng.normal(size=(6, 4)).astype(np.float32),
      'labels': np.zeros(6, np.int32),
    }
    self.family = models.Classifier(
      Mine(),
      example=self.batch,
      axes=(
        ('heads/kernel', ('inputs', 'outputs', 'outputs')),
        ('joined/kernel', ('inputs', 'inputs', 'outputs')),
        ('scaled/weight', ('inputs', 'outputs')),
        ('head/kernel', ('inputs', 'outputs')),
        ('heads/bias', ('outputs', 'outputs')),
        ('.*bias', ('outputs',)),
      ),
    )

  def adapted(self, adapter):
    family = mj.adapters.adapt(self.family, adapter)
    base = family.plain.init(jax.random.key(0))
    base = jax.tree.map(lambda x: x + 0.1, base)
    return family, base

  def test_kernels_are_told(self):
    told = {Scaled: _describe}
    for adapter in (
      mj.adapters.lora(rank=2, targets='.*/(kernel|weight)', kernels=told),
      mj.adapters.ia3(
        rules=[
          ('joined/kernel', 'inputs'),
          ('scaled/weight', 'inputs'),
          ('(heads|head)/kernel', 'outputs'),
        ],
        kernels=told,
      ),
    ):
      family, base = self.adapted(adapter)
      fresh = family.start(base, jax.random.key(1))
      folder = self.create_tempdir().full_path
      with self.assertRaisesRegex(errors.ConfigError, "'scaled/weight'"):
        mj.adapters.save(f'{folder}/a', family, fresh)
      before = family.plain.logits(base, self.batch)
      np.testing.assert_array_equal(family.logits(fresh, self.batch), before)
      params = family.joined(base, small_adapted.leaves(family.adapter_specs))
      found = family.logits(params, self.batch)
      self.assertGreater(float(jnp.max(jnp.abs(found - before))), 0.1)
      if isinstance(adapter, type(mj.adapters.ia3())):
        folded = mj.adapters.fold(family, params)
        np.testing.assert_allclose(
          family.plain.logits(folded, self.batch), found, rtol=1e-4, atol=1e-4
        )

  def test_an_adapter_of_your_own(self):
    class Doubled(mj.adapters.LayerAdapter):
      def sites(self, base):
        return sites.find(base, 'head/kernel')

      def parts(self, site):
        return {
          'by': mj.adapters.Part((), (), lambda key, shape: jnp.ones(shape))
        }

      def before(self, site, parts, inputs):
        return 2 * parts['by'] * inputs

    family, base = self.adapted(Doubled())
    params = family.start(base, jax.random.key(1))
    twice = {
      **base,
      'head': {**base['head'], 'kernel': 2 * base['head']['kernel']},
    }
    np.testing.assert_allclose(
      family.logits(params, self.batch),
      family.plain.logits(twice, self.batch),
      rtol=1e-5,
    )  # fmt: skip

  def test_lora_by_hand(self):
    x = self.batch['inputs']
    for stabilised, by in ((False, 3), (True, np.sqrt(3))):
      family, base = self.adapted(
        mj.adapters.lora(
          rank=3, alpha=2, targets='heads/kernel', rank_stabilised=stabilised
        )
      )
      own = small_adapted.leaves(family.adapter_specs)
      a, b = (np.float64(own['heads'][f'lora_{n}']) for n in 'ab')
      self.assertEqual((a.shape, b.shape), ((4, 3), (3, 2, 3)))
      changed = np.float64(base['heads']['kernel'])
      changed = changed + 2 / by * np.einsum('ir,rhk->ihk', a, b)
      expected = family.plain.logits(
        {**base, 'heads': {**base['heads'], 'kernel': np.float32(changed)}},
        {'inputs': x},
      )
      found = family.logits(family.joined(base, own), {'inputs': x})
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

  def test_kernels_are_not_told(self):
    family, base = self.adapted(mj.adapters.lora(targets='.*/(kernel|weight)'))
    params = family.start(base, jax.random.key(1))
    with self.assertRaisesRegex(
      errors.StructureError, r'scaled/weight\n.*kernels='
    ):
      family.logits(params, self.batch)


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(rank=0), 'rank must be'),
    (dict(alpha=-1), 'alpha must be'),
    (dict(dropout=1), 'dropout=1 drops'),
    (dict(targets='.*/quary/kernel'), "target '.*/quary/kernel' matches no"),
    (dict(targets='(', ), 'not a regular'),
    (dict(targets='.*scale'), 'not the kernel'),
    (dict(targets='.*embedding'), 'not the kernel'),
    (dict(targets=()), 'needs targets'),
    (dict(rank=[('.*query/kernel', 2)]), 'No rank rule'),
    (dict(rank=[('.*', 2), ('.*x', 3)]), 'match nothing'),
  )  # fmt: skip
  def test_lora(self, settings, message):
    family, _ = small_adapted.build('lm')
    with self.assertRaisesRegex(errors.UserError, message):
      mj.adapters.adapt(family, mj.adapters.lora(**settings))

  def test_lists_of_answers_need_an_encoder(self):
    family, _ = small_adapted.build('lm')
    with self.assertRaisesRegex(errors.ConfigError, 'encoder-decoder'):
      family.answer_logits(np.int32([[1]]))

  @parameterized.parameters('ia3', 'bottleneck')
  def test_experts(self, name):
    family, base = small_adapted.build(
      'lm', moe=dict(num_experts=2, group_size=8)
    )
    adapted = mj.adapters.adapt(family, ADAPTERS[name])
    params = adapted.start(base, jax.random.key(0))
    with self.assertRaisesRegex(errors.StructureError, 'mlp/expert/wo/kernel'):
      adapted.logits(params, small_adapted.batch(2))

  def test_a_method_that_is_not_given(self):
    for kind in (mj.adapters.Adapter, mj.adapters.LayerAdapter):
      with self.assertRaisesRegex(TypeError, 'abstract .*(specs|parts)'):
        type('Mine', (kind,), {})()

  def test_others(self):
    family, base = small_adapted.build('lm')
    adapted = mj.adapters.adapt(family, mj.adapters.bottleneck(width=2))
    with self.assertRaisesRegex(errors.ConfigError, 'cannot be folded'):
      mj.adapters.fold(adapted, adapted.start(base, jax.random.key(0)))
    with self.assertRaisesRegex(errors.ConfigError, 'has an adapter already'):
      mj.adapters.adapt(adapted, mj.adapters.lora())
    with self.assertRaisesRegex(errors.StructureError, 'lack leaves'):
      adapted.logits(base, small_adapted.batch(2))
    with self.assertRaisesRegex(errors.ConfigError, "'output'"):
      mj.adapters.ia3(rules=[('.*', 'output')])
    with self.assertRaisesRegex(errors.ConfigError, 'activation'):
      mj.adapters.bottleneck(activation='gulu')
    wider, _ = small_adapted.build('lm', emb_dim=6)
    other = mj.adapters.adapt(wider, mj.adapters.ia3())
    leaves = small_adapted.leaves(other.adapter_specs)
    with self.assertRaisesRegex(errors.StructureError, 'missing|expected'):
      adapted.joined(base, leaves)


if __name__ == '__main__':
  absltest.main()
