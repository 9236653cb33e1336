# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ladder Side-Tuning against the released code's numbers, and its laws."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import small_adapted

import mergejax as mj
from mergejax import partition
from mergejax.adapters import pruning
from mergejax.adapters import side_stacks
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import t5_hf
from mergejax.training import losses

CLOSE = dict(rtol=1e-4, atol=2e-5)


def of_golden(name):
  """`(arrays, base family, its parameters, ladder, the ladder's leaves)`."""
  arrays = goldens.load(name)
  renamed = {
    k.replace('backbone/', 'params/'): x
    for k, x in arrays.items()
    if not k.endswith('_side_layers')
  }
  family, base = small_adapted.of_golden(renamed, tied=True)
  adapter = mj.adapters.ladder(
    reduction=4,
    encoder_layers=arrays['config/encoder_side_layers'].tolist(),
    decoder_layers=arrays['config/decoder_side_layers'].tolist(),
  )
  wanted = adapter.specs(family.specs())
  return arrays, family, base, adapter, side_of_golden(arrays, wanted)


def side_of_golden(arrays, wanted):
  """Leaves of the side network from PyTorch's names; unused gates left out."""
  side = {
    k.removeprefix('side/'): x
    for k, x in arrays.items()
    if k.startswith('side/')
  }
  blocks, found = {}, {}
  for name, x in side.items():
    if 'side_block' in name:
      # The one table is in the first kept block, whichever that is.
      name = re.sub(r'side_block\.\d+(.*relative)', r'block.0\1', name)
      blocks[name.replace('side_block', 'block')] = x
    elif name == 'side_final_upsample.weight':
      found['side/up/kernel'] = x.T
    elif name == 'side_final_upsample.bias':
      found['side/up/bias'] = x
    else:
      stack, rest = name.split('.', 1)
      rest = re.sub(r'side_gate_params\.(\d+)', r'gate_\1', rest)
      rest = rest.replace('side_first_downsample', 'first')
      rest = re.sub(r'side_downsamples\.(\d+)', r'down_\1', rest)
      rest = rest.replace('final_side_layer_norm.weight', f'{stack}_norm/scale')
      rest = rest.replace('.weight', '/kernel').replace('.bias', '/bias')
      x = x[0] if 'gate' in rest else x.T
      found[f'side/{stack}/{rest}'] = x
  for path, x in t5_hf.from_hf(blocks, tied_head=True).items():
    found[f'side/{path}'] = x
  return {path: jnp.asarray(found[path]) for path in wanted}


def batch_of(arrays):
  labels = np.maximum(arrays['labels'], 0)
  counted = arrays['labels'] > 0
  return {
    'encoder_input_tokens': arrays['input_ids'] * arrays['attention_mask'],
    'decoder_input_tokens': arrays['decoder_input_ids'],
    # Padding targets are masked by weight alone, as there.
    'decoder_target_tokens': np.maximum(labels, 1),
    'decoder_loss_weights': counted.astype(np.float32),
  }


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters('lst_t5_full', 'lst_t5_dropped')
  def test_released_code(self, name):
    arrays, family, base, adapter, leaves = of_golden(name)
    adapted = mj.adapters.adapt(family, adapter)
    params = adapted.joined(base, tree.unflatten(leaves))
    batch = batch_of(arrays)
    states = []

    def spy(run, arguments, named, context):
      found = run(*arguments, **named)
      in_side = isinstance(context.module.parent, side_stacks.SideStack)
      if in_side and context.module.parent.name == 'encoder':
        states.append((context.module.name, arguments[0], found))
      return found

    @jax.jit
    def loss(own):
      states.clear()
      with nn.intercept_methods(spy):
        out = adapted.apply(adapted.variables({**params, 'side': own}), batch)
      each, _ = losses.token_cross_entropy(out.logits, out.targets)
      mean = jnp.sum(each * out.weights) / jnp.sum(out.weights)
      return mean, (out.logits, {n: (a, f) for n, a, f in states})

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (found, (logits, met)), gradients = grad(params['side'])
    np.testing.assert_allclose(logits, arrays['logits'], **CLOSE)
    np.testing.assert_allclose(found, arrays['loss'], **CLOSE)
    # What is computed at padding is arbitrary, and differs.
    real = arrays['attention_mask'] > 0
    np.testing.assert_allclose(
      met['encoder_norm'][1][real],
      arrays['encoder_side_last_hidden'][real],
      **CLOSE,
    )
    checked = 0
    for stack in ('encoder', 'decoder'):
      for i in adapter.kept(family.specs(), stack):
        np.testing.assert_allclose(
          gradients[stack][f'gate_{i}'],
          arrays[f'grad/{stack}.side_gate_params.{i}'][0],
          **CLOSE,
        )
        checked += 1
    self.assertEqual(checked, {'lst_t5_full': 7, 'lst_t5_dropped': 5}[name])
    # State before mixing of a kept block i: the output of the kept one before.
    kept = adapter.kept(family.specs(), 'encoder')
    for i, following in zip(kept, kept[1:]):
      np.testing.assert_allclose(
        met[f'layers_{i}'][1][real],
        arrays[f'encoder_side_hidden/{following}'][real],
        **CLOSE,
      )

  def test_parameters_of_the_golden(self):
    _, family, _, adapter, leaves = of_golden('lst_t5_full')
    self.assertEqual(mj.adapters.count(adapter, family.specs()), 3799)
    self.assertEqual(sum(x.size for x in leaves.values()), 3799)


SIZES = dict(head_dim=4, mlp_dim=12)


def built(kind='t5', adapter=None, **changes):
  """`(adapted family, params)` with leaves that are nothing special."""
  family, base = small_adapted.build(kind, **SIZES, **changes)
  adapted = mj.adapters.adapt(
    family, adapter or mj.adapters.ladder(reduction=2)
  )
  leaves = small_adapted.leaves(adapted.adapter_specs)
  return adapted, adapted.joined(base, leaves)


def changed(params, rules):
  """Parameters with other leaves: `{regular expression: function}`."""

  def one(path, leaf):
    for pattern, fn in rules.items():
      if re.fullmatch(pattern, path):
        leaf = jnp.asarray(fn(leaf), leaf.dtype)
    return leaf

  return tree.map_paths(one, params)


def other(leaf):
  return leaf[..., ::-1] + 0.5


def at(value):
  return lambda leaf: np.full_like(leaf, value)


class LawsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.adapted, cls.params = built()
    cls.batch = small_adapted.batch()
    cls.answer = staticmethod(jax.jit(cls.adapted.logits))
    cls.logits = cls.answer(cls.params, cls.batch)

  def differs(self, rules, than=None):
    """Largest change of the logits when some leaves are others."""
    than = {} if than is None else than
    one = self.answer(changed(self.params, than), self.batch)
    found = self.answer(changed(self.params, {**than, **rules}), self.batch)
    return float(jnp.max(jnp.abs(found - one)))

  def test_the_backbone_is_read(self):
    for part in ('encoder/layers_0/mlp/wo', 'decoder/layers_1/mlp/wo'):
      self.assertGreater(self.differs({f'{part}/kernel': other}), 1e-3, part)
    # Of the backbone's decoder the head is given nothing.
    self.assertEqual(self.differs({'decoder/decoder_norm/scale': other}), 0)

  def test_open_gates_hide_the_ladders(self):
    gates = {'.*/gate_.*': at(10.0)}
    downs = {r'side/.*/down_\d/.*': other}
    self.assertGreater(self.differs(downs), 1e-3)
    self.assertEqual(self.differs(downs, than=gates), 0)
    for stack in ('encoder', 'decoder'):
      first = {f'side/{stack}/first/kernel': other}
      self.assertGreater(self.differs(first, than=gates), 1e-3)

  def test_shut_gates_discard_the_state(self):
    gates = {'.*/gate_.*': at(-20.0)}
    before = {'side/(encoder|decoder)/(first|down_0|layers_0)/.*': other}
    self.assertGreater(self.differs(before), 1e-3)
    self.assertEqual(self.differs(before, than=gates), 0)

  def test_several_answers_to_one_input(self):
    tokens = self.batch['decoder_target_tokens']
    both = np.stack([tokens, np.roll(tokens, 1, axis=0)], axis=1)
    variables = self.adapted.variables(self.params)
    found = jax.jit(self.adapted.choice_logits)(variables, self.batch, both)
    real = tokens > 0
    np.testing.assert_allclose(
      found[:, 0][real], self.logits[real], rtol=1e-4, atol=1e-4
    )

  def test_ladders_that_are_brought(self):
    found = jax.jit(
      lambda p, b: mj.adapters.collect_ladders(self.adapted, p, b)
    )(self.params, self.batch)
    rows, inputs = self.batch['encoder_input_tokens'].shape
    self.assertEqual(found['encoder_ladders'].shape, (rows, 3, inputs, 8))
    brought = {**self.batch, **found}
    np.testing.assert_array_equal(
      self.answer(self.params, brought), self.logits
    )
    # Nothing of the backbone's layers is at work.
    broken = changed(self.params, {'(en|de)coder/layers.*': at(np.nan)})
    np.testing.assert_array_equal(self.answer(broken, brought), self.logits)
    # An answer of another length is not theirs; the backbone reads it.
    variables = self.adapted.variables(self.params)
    choices = self.batch['decoder_target_tokens'][:, None]
    score = jax.jit(self.adapted.choice_logits)
    np.testing.assert_array_equal(
      score(variables, brought, choices),
      score(variables, self.batch, choices),
    )
    short = {**brought, 'decoder_ladders': found['decoder_ladders'][:, :2]}
    with self.assertRaisesRegex(errors.DataError, 'collect them anew'):
      self.adapted.logits(self.params, short)

  def test_sharded_equals_unsharded(self):
    mesh, rules = partition.make_mesh(data=4, model=2), partition.standard()
    specs = self.adapted.specs()
    layout = partition.shardings(
      mesh, self.params, {p: spec.axes for p, spec in specs.items()}, rules
    )
    for path, place in tree.flatten(layout).items():
      if path.startswith('side/'):
        self.assertNotIn('model', place.spec, path)

    def logits(params, batch):
      with partition.rules_of(mesh, rules):
        return self.adapted.logits(params, batch)

    found = jax.jit(logits)(jax.device_put(self.params, layout), self.batch)
    np.testing.assert_allclose(found, self.logits, rtol=2e-4, atol=2e-4)


class DecodingTest(parameterized.TestCase):
  @parameterized.parameters('t5', 'lm')
  def test_step_by_step(self, kind):
    adapted, params = built(kind)
    batch = dict(small_adapted.batch(3))
    batch['decoder_target_tokens'] = np.maximum(
      batch['decoder_target_tokens'], 1
    )
    expected = jax.jit(adapted.logits)(params, batch)
    tokens = batch['decoder_input_tokens']

    @jax.jit
    def decoded(params):
      cache = adapted.init_cache(params, batch, tokens.shape[1])
      found = []
      for i in range(tokens.shape[1]):
        logits, cache = adapted.decode_step(params, cache, tokens[:, i])
        found.append(logits)
      return jnp.stack(found, axis=1)

    np.testing.assert_allclose(decoded(params), expected, rtol=5e-4, atol=5e-4)


class VariantsTest(parameterized.TestCase):
  def test_a_ladder_as_wide_as_the_backbone_can_be_it(self):
    adapted, params = built(adapter=mj.adapters.ladder(reduction=1))
    base, _ = adapted.split(params)
    params = adapted.start(base, jax.random.key(0))
    same = {
      r'side/.*/gate_\d': at(10.0),
      'side/((en|de)coder/first|up)/kernel': lambda x: np.eye(len(x)),
    }
    params = changed(params, same)
    batch = small_adapted.batch()
    np.testing.assert_allclose(
      jax.jit(adapted.logits)(params, batch),
      jax.jit(adapted.plain.logits)(base, batch),
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip

  def test_merge_last(self):
    adapter = mj.adapters.ladder(reduction=2, merge_last=True)
    adapted, params = built(adapter=adapter)
    batch = small_adapted.batch()
    run = jax.jit(adapted.logits)
    base, _ = adapted.split(params)
    plain = jax.jit(adapted.plain.logits)(base, batch)
    shut = run(changed(params, {'side/gate_last': at(-20.0)}), batch)
    np.testing.assert_allclose(shut, plain, rtol=1e-5, atol=1e-5)
    half = run(changed(params, {'side/gate_last': at(0.0)}), batch)
    side = run(changed(params, {'side/gate_last': at(20.0)}), batch)
    np.testing.assert_allclose(half, (shut + side) / 2, rtol=1e-4, atol=1e-4)
    found = mj.adapters.collect_ladders(adapted, params, batch)
    self.assertIn('decoder_last', found)
    np.testing.assert_allclose(
      run(params, {**batch, **found}), run(params, batch), rtol=1e-4, atol=1e-4
    )

  def test_mixing_after_the_block_and_sums(self):
    adapter = mj.adapters.ladder(
      reduction=2, decoder_layers=[1], residual='after'
    )
    adapted, params = built('lm', adapter)
    batch = small_adapted.batch()
    run = jax.jit(adapted.logits)
    shut = changed(params, {'.*/gate_.*': at(-20.0)})
    # Behind the block the ladder alone goes on.
    block = changed(shut, {'side/decoder/(first|layers_1)/.*': other})
    np.testing.assert_array_equal(run(block, batch), run(shut, batch))
    self.assertGreater(
      float(jnp.max(jnp.abs(run(params, batch) - run(shut, batch)))), 1e-3
    )
    # Two ladders that are equal, and blocks that do nothing: s + D(h).
    summed = mj.adapters.ladder(reduction=2, decoder_layers=[1], gates='sum')
    adapted, params = built('lm', summed)
    idle = {'side/decoder/layers_1/.*/(out|wo)/kernel': at(0.0)}
    params = changed(params, idle)
    run = jax.jit(adapted.logits)
    first = changed(params, {'side/decoder/down_1/.*': at(0.0)})
    moved = changed(
      first, {'side/decoder/first/bias': lambda b: b + np.float32(0.25)}
    )
    through = changed(first, {'side/decoder/down_1/bias': at(0.25)})
    np.testing.assert_allclose(
      run(through, batch), run(moved, batch), rtol=1e-5, atol=1e-5
    )
    self.assertGreater(
      float(jnp.max(jnp.abs(run(moved, batch) - run(first, batch)))), 1e-3
    )

  def test_dropout(self):
    adapted, params = built(dropout_rate=0.5)
    batch, variables = small_adapted.batch(), adapted.variables(params)
    apply = jax.jit(
      lambda key: adapted.call(
        variables, batch, train=True, rngs={'dropout': key}
      )[0]
    )
    one, two = apply(jax.random.key(0)), apply(jax.random.key(1))
    self.assertGreater(float(jnp.max(jnp.abs(one - two))), 1e-3)
    np.testing.assert_array_equal(one, apply(jax.random.key(0)))


class BeginningTest(parameterized.TestCase):
  def test_fresh_leaves(self):
    family, base = small_adapted.build('t5', **SIZES)
    adapter = mj.adapters.ladder(reduction=2, encoder_layers=[1])
    leaves = tree.flatten(adapter.init(family.specs(), jax.random.key(0), base))
    self.assertNotIn('side/encoder/gate_0', leaves)
    self.assertEqual(leaves['side/encoder/gate_1'], 0)
    pruned = pruning.prune(family.specs(), base, 2)
    given = tree.flatten(base)
    for stack, kept in (('encoder', (1,)), ('decoder', (0, 1))):
      table = f'{stack}/relpos_bias/rel_embedding'
      np.testing.assert_array_equal(leaves[f'side/{table}'], given[table])
      for path, leaf in pruned.items():
        named = re.match(rf'{stack}/layers_(\d)', path)
        if named and int(named[1]) in kept:
          np.testing.assert_array_equal(leaves[f'side/{path}'], leaf)
    down = leaves['side/decoder/down_0/kernel']
    self.assertBetween(float(jnp.std(down)), 0.005, 0.02)
    drawn = mj.adapters.ladder(reduction=2, start='random')
    leaves = tree.flatten(drawn.init(family.specs(), jax.random.key(0), base))
    path = 'side/encoder/layers_0/attention/query/kernel'
    self.assertFalse(np.array_equal(leaves[path], pruned[path[5:]]))

  def test_counts_from_shapes_alone(self):
    sizes = dict(
      model_type='t5x', vocab_size=32128, emb_dim=768, num_heads=12,
      head_dim=64, mlp_dim=3072, mlp_activations=('relu',),
      num_encoder_layers=12, num_decoder_layers=12, logits_via_embedding=True,
    )  # fmt: skip
    base = mj.models.family_of(mj.models.build(sizes)).specs()
    kept = [1, 2, 3, 5, 6, 7, 9, 10, 11]
    count = lambda **given: mj.adapters.count(mj.adapters.ladder(**given), base)
    both = dict(encoder_layers=kept, decoder_layers=kept)
    self.assertEqual(count(**both), 3_878_706)
    share = 3_878_706 / sum(spec.size for spec in base.values())
    self.assertAlmostEqual(share, 0.0174, places=4)
    for kept_layers in (kept, kept[:6], kept[:3], None):
      m = 12 if kept_layers is None else len(kept_layers)
      self.assertEqual(
        count(encoder_layers=kept_layers, decoder_layers=kept_layers),
        formula(m, m),
      )
    self.assertEqual(count(gates='sum'), formula(12, 12) - 24)
    self.assertEqual(count(gates='fixed'), formula(12, 12) - 24)
    self.assertEqual(count(merge_last=True), formula(12, 12) + 1)


def formula(encoder, decoder, d=768, n=12, k=64, f=3072, r=8, buckets=32):
  """Parameters of a T5's ladder, by section 6 of the specification."""
  d_, k_, f_ = d // r, k // r, f // r
  attention = 4 * d_ * n * k_
  blocks = (
    attention + 2 * d_ * f_ + 2 * d_, 2 * attention + 2 * d_ * f_ + 3 * d_
  )  # fmt: skip
  stacks = [
    (m + 1) * (d * d_ + d_) + m * block + m + buckets * n + d_
    for m, block in zip((encoder, decoder), blocks)
  ]
  return sum(stacks) + d_ * d + d


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(encoder_layers=[]), 'at least one layer'),
    (dict(decoder_layers=3), 'at least one layer'),
    (dict(decoder_layers=[0, 0]), 'names a layer twice'),
    (dict(decoder_layers=[-1]), 'whole number of 0 or more'),
    (dict(encoder_layers=[0, 2]), 'has 2 layers, numbered from 0 to 1'),
    (dict(reduction=0), 'reduction must be'),
    (dict(reduction=8), r'does not divide the size of a head \(head_dim\), 4'),
    (dict(gates='learnt'), "'learned'"),
    (dict(residual='behind'), 'residual'),
    (dict(start='prune'), 'pruned'),
    (dict(temperature=0), 'temperature'),
  )
  def test_settings(self, settings, message):
    family, _ = small_adapted.build('t5', **SIZES)
    with self.assertRaisesRegex(errors.ConfigError, message):
      mj.adapters.adapt(
        family, mj.adapters.ladder(**{'reduction': 2, **settings})
      )

  def test_models(self):
    ladder = mj.adapters.ladder(reduction=2)
    scanned, _ = small_adapted.build('t5', scan_layers=True, **SIZES)
    with self.assertRaisesRegex(errors.ConfigError, 'scan_layers=False'):
      mj.adapters.adapt(scanned, ladder)
    mlp = mj.models.build({'model_type': 'mlp', 'hidden': (4,)})
    with self.assertRaisesRegex(errors.ConfigError, 'decoder/layers_0'):
      mj.adapters.adapt(mlp, ladder)
    decoder, _ = small_adapted.build('lm', **SIZES)
    with self.assertRaisesRegex(errors.ConfigError, 'leave it out'):
      mj.adapters.adapt(
        decoder, mj.adapters.ladder(reduction=2, encoder_layers=[0])
      )
    sparse, _ = small_adapted.build('t5', moe=dict(num_experts=2))
    with self.assertRaisesRegex(errors.ConfigError, 'layers_1/mlp/expert'):
      mj.adapters.adapt(sparse, ladder)
    adapted, params = built(remat_policy='full')
    with self.assertRaisesRegex(errors.ConfigError, 'remat_policy'):
      adapted.logits(params, small_adapted.batch())
    with self.assertRaisesRegex(errors.ConfigError, 'cannot be folded'):
      mj.adapters.fold(adapted, params)

  def test_importance(self):
    family, base = small_adapted.build('t5', **SIZES)
    adapter, key = mj.adapters.ladder(reduction=2), jax.random.key(0)
    begun = adapter.begin(family.specs(), key, base, base)
    self.assertEqual({*tree.flatten(begun)}, {*adapter.specs(family.specs())})
    lacking = tree.flatten(base)
    del lacking['decoder/layers_1/mlp/wo/kernel']
    with self.assertRaisesRegex(errors.StructureError, 'layers_1/mlp/wo'):
      adapter.begin(family.specs(), key, base, tree.unflatten(lacking))


if __name__ == '__main__':
  absltest.main()
