# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ladder Side-Tuning: released numbers, beginnings, counts and mistakes."""

import re
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import small_adapted
import tiers

import mergejax as mj
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


@tiers.slow('test_released_code0')
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


@tiers.slow('test_fresh_leaves_of_scanned_layers0')
class BeginningTest(parameterized.TestCase):
  def test_fresh_leaves(self):
    family, base = small_adapted.build('t5')
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
    with mock.patch.object(pruning, 'prune', return_value={}) as walks:
      again = mj.adapters.ladder(reduction=2, rounds=3)
      again.init(family.specs(), jax.random.key(0), base)
    self.assertEqual(walks.call_args.kwargs, {'rounds': 3})
    down = leaves['side/decoder/down_0/kernel']
    self.assertBetween(float(jnp.std(down)), 0.005, 0.02)
    drawn = mj.adapters.ladder(reduction=2, start='random')
    leaves = tree.flatten(drawn.init(family.specs(), jax.random.key(0), base))
    path = 'side/encoder/layers_0/attention/query/kernel'
    self.assertFalse(np.array_equal(leaves[path], pruned[path[5:]]))

  @parameterized.parameters(dict(axis=0), dict(axis=1))
  def test_fresh_leaves_of_scanned_layers(self, axis):
    family, base = small_adapted.build('t5', num_decoder_layers=3)
    scanned, _ = small_adapted.build(
      't5', num_decoder_layers=3, scan_layers=True, param_scan_axis=axis
    )
    stacked = lambda params: tree.unflatten(
      scanned.arranged(tree.flatten(params))
    )
    adapter, key = mj.adapters.ladder(reduction=2), jax.random.key(0)
    importance = tree.map_paths(lambda _, x: np.square(x[..., ::-1]), base)
    by_size = (
      adapter.init(family.specs(), key, base),
      adapter.init(scanned.specs(), key, stacked(base)),
    )
    by_fisher = (
      adapter.begin(family.specs(), key, base, importance),
      adapter.begin(
        scanned.specs(), key, stacked(base), stacked(importance)
      ),
    )  # fmt: skip
    for one, other in (by_size, by_fisher):
      one, other = tree.flatten(one), tree.flatten(other)
      self.assertEqual({*one}, {*other})
      for path, leaf in one.items():
        np.testing.assert_array_equal(other[path], leaf, err_msg=path)
    self.assertEqual(
      adapter.specs(scanned.specs()), adapter.specs(family.specs())
    )
    path = 'side/decoder/layers_2/mlp/wo/kernel'
    one, other = (tree.flatten(each[0])[path] for each in (by_size, by_fisher))
    self.assertFalse(np.array_equal(one, other))
    lacking = tree.flatten(stacked(importance))
    del lacking['decoder/decoder/mlp/wo/kernel']
    with self.assertRaisesRegex(errors.StructureError, 'decoder/mlp/wo'):
      adapter.begin(
        scanned.specs(), key, stacked(base), tree.unflatten(lacking)
      )

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
    (dict(rounds=0), 'rounds must be'),
    (dict(reduction=8), r'does not divide the size of a head \(head_dim\), 4'),
    (dict(gates='learnt'), "'learned'"),
    (dict(residual='behind'), 'residual'),
    (dict(start='prune'), 'pruned'),
    (dict(temperature=0), 'temperature'),
    (dict(gate=1.0), 'gate must be above 0 and below 1'),
  )
  def test_settings(self, settings, message):
    family, _ = small_adapted.build('t5')
    with self.assertRaisesRegex(errors.ConfigError, message):
      mj.adapters.adapt(
        family, mj.adapters.ladder(**{'reduction': 2, **settings})
      )

  def test_models(self):
    ladder = mj.adapters.ladder(reduction=2)
    mlp = mj.models.build({'model_type': 'mlp', 'hidden': (4,)})
    with self.assertRaisesRegex(errors.ConfigError, 'decoder/layers_0'):
      mj.adapters.adapt(mlp, ladder)
    decoder, _ = small_adapted.build('lm')
    with self.assertRaisesRegex(errors.ConfigError, 'leave it out'):
      mj.adapters.adapt(
        decoder, mj.adapters.ladder(reduction=2, encoder_layers=[0])
      )
    sparse, _ = small_adapted.build('t5', moe=dict(num_experts=2))
    with self.assertRaisesRegex(errors.ConfigError, 'layers_1/mlp/expert'):
      mj.adapters.adapt(sparse, ladder)
    kept, base = small_adapted.build('t5', remat_policy='full')
    adapted = mj.adapters.adapt(kept, ladder)
    params = adapted.start(base, jax.random.key(0))
    with self.assertRaisesRegex(errors.ConfigError, 'remat_policy'):
      adapted.logits(params, small_adapted.batch())
    with self.assertRaisesRegex(errors.ConfigError, 'cannot be folded'):
      mj.adapters.fold(adapted, params)

  def test_importance(self):
    family, base = small_adapted.build('t5')
    adapter, key = mj.adapters.ladder(reduction=2), jax.random.key(0)
    begun = adapter.begin(family.specs(), key, base, base)
    self.assertEqual({*tree.flatten(begun)}, {*adapter.specs(family.specs())})
    lacking = tree.flatten(base)
    del lacking['decoder/layers_1/mlp/wo/kernel']
    with self.assertRaisesRegex(errors.StructureError, 'layers_1/mlp/wo'):
      adapter.begin(family.specs(), key, base, tree.unflatten(lacking))


if __name__ == '__main__':
  absltest.main()
