# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scanned layers and remat: the numbers stay those of layers one by one."""

import dataclasses
import json

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers

from mergejax import models
from mergejax import partition
from mergejax import select
from mergejax import statistics
from mergejax import training
from mergejax.core import errors
from mergejax.core import statistic_specs
from mergejax.core import tree
from mergejax.models import layer_stacks
from mergejax.names import known
from mergejax.nn import lm
from mergejax.nn import stack
from mergejax.nn import t5

SIZES = dict(vocab_size=24, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=10)


def family(kind, **changes):
  """A T5 of 2 + 2 layers, or a decoder-only model of 2."""
  if kind == 't5':
    layers = dict(num_encoder_layers=2, num_decoder_layers=2)
    config = t5.T5Config(**SIZES | layers | changes)
    return models.family_of(t5.Transformer(config))
  config = lm.LMConfig(num_layers=2, **SIZES | changes)
  return models.family_of(lm.LanguageModel(config))


def batch_of(rows=2, length=5):
  rng = np.random.default_rng(0)
  targets = rng.integers(1, 24, (rows, length))
  targets[0, 3:] = 0
  return {
    'encoder_input_tokens': rng.integers(1, 24, (rows, 4)),
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': targets,
  }


def restacked(params, model):
  return tree.unflatten(
    layer_stacks.restack(tree.flatten(params), model.config)
  )


def loss_of(model, batch):
  objective = training.objective.cross_entropy()
  return lambda params: objective(model, params, batch, {})[0]


def logits_loss_and_gradient(model, params, batch):
  objective = training.objective.cross_entropy()

  def loss(params):
    value, outputs = objective(model, params, batch, {})
    return value, outputs.logits

  graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (value, logits), gradient = graded(params)
  return logits, value, gradient


def assert_close(expected, given, **tolerance):
  expected, given = tree.flatten(expected), tree.flatten(given)
  assert expected.keys() == given.keys()
  for path, leaf in expected.items():
    np.testing.assert_allclose(leaf, given[path], err_msg=path, **tolerance)


FORMS = parameterized.parameters(('t5', 1, False), ('lm', 0, True))


@tiers.slow('test_cached_.*1')
class ScanTest(parameterized.TestCase):
  @FORMS
  def test_equals_one_by_one(self, kind, axis, per_layer):
    apart = family(kind, relative_per_layer=per_layer)
    scanned = family(
      kind, relative_per_layer=per_layer, scan_layers=True, param_scan_axis=axis
    )
    params = drawn.params(apart)
    stacked = restacked(params, scanned)
    fresh = jax.eval_shape(scanned.init, jax.random.key(0))
    self.assertEmpty(tree.difference(tree.specs(fresh), tree.specs(stacked)))
    batch = batch_of()
    logits, loss, grad = logits_loss_and_gradient(apart, params, batch)
    found, other, given = logits_loss_and_gradient(scanned, stacked, batch)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    assert_close(restacked(grad, scanned), given, rtol=1e-4, atol=1e-6)

  @FORMS
  def test_cached_decoding_equals_whole_rows(self, kind, axis, per_layer):
    model = family(
      kind, relative_per_layer=per_layer, scan_layers=True, param_scan_axis=axis
    )
    params = drawn.params(model)
    batch = batch_of()
    batch['decoder_target_tokens'] = np.maximum(
      batch['decoder_target_tokens'], 1
    )
    expected = jax.jit(model.logits)(params, batch)
    cache = jax.jit(model.init_cache, static_argnums=2)(params, batch, 5)
    step = jax.jit(model.decode_step)
    for i in range(5):
      tokens = jnp.asarray(batch['decoder_input_tokens'][:, i])
      found, cache = step(params, cache, tokens)
      np.testing.assert_allclose(
        found, expected[:, i], rtol=1e-4, atol=1e-5, err_msg=str(i)
      )

  def test_layers_begin_with_numbers_of_their_own(self):
    model = family('t5', scan_layers=True)
    kernel = model.init(jax.random.key(0))['encoder']['encoder']['mlp']['wo'][
      'kernel'
    ]
    self.assertEqual(kernel.shape, (10, 2, 8))
    self.assertGreater(np.abs(kernel[:, 0] - kernel[:, 1]).max(), 0.1)
    # Fan-in is that of one layer, whatever the number of layers.
    self.assertAlmostEqual(float(kernel.std()), 10**-0.5, delta=0.1)

  @parameterized.parameters(None, 0)
  def test_every_layer_draws_its_own_random_numbers(self, axis):
    class Draw(nn.Module):
      def __call__(self, x):
        drawn = jax.random.uniform(self.make_rng('dropout'), (1,))
        return jnp.concatenate([drawn, x[:-1]])

    class Model(nn.Module):
      @nn.compact
      def __call__(self, x):
        return stack.apply(Draw, 3, 'draw', x, scan_axis=axis)

    drawn = Model().apply({}, jnp.zeros(3), rngs={'dropout': jax.random.key(0)})
    self.assertLen(set(drawn.tolist()), 3)

  def test_the_program_does_not_grow_with_depth(self):
    sizes = []
    for depth in (2, 12):
      model = family(
        't5', scan_layers=True, num_encoder_layers=depth,
        num_decoder_layers=depth,
      )  # fmt: skip
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      program = jax.jit(jax.grad(loss_of(model, batch_of()))).lower(shapes)
      sizes.append(len(program.as_text().splitlines()))
    self.assertEqual(sizes[0], sizes[1])

  def test_axes_name_the_layers(self):
    for axis in (0, 1):
      model = family('t5', scan_layers=True, param_scan_axis=axis)
      specs = model.specs()
      for path, spec in specs.items():
        stacked = path.startswith(('encoder/encoder/', 'decoder/decoder/'))
        self.assertEqual('layers' in spec.axes, stacked, path)
        if stacked:
          self.assertEqual(spec.axes.index('layers'), axis)
      table = specs['encoder/relpos_bias/rel_embedding']
      self.assertEqual(table.axes, ('heads', 'relpos_buckets'))
      # Checkpoints know them without the module.
      self.assertEqual(
        known.axes(specs, models.describe(model.module)),
        {path: spec.axes for path, spec in specs.items()},
      )

  def test_adafactor_takes_every_layer_for_itself(self):
    apart = family('lm', emb_dim=16, mlp_dim=12)
    scanned = family('lm', emb_dim=16, mlp_dim=12, scan_layers=True)
    params = drawn.params(apart)
    states = []
    for model, start in (
      (apart, params), (scanned, restacked(params, scanned)),
    ):  # fmt: skip
      trainer = training.Trainer(
        model,
        training.optim.adafactor(0.1, min_dim_size_to_factor=8),
        mesh=partition.make_mesh(devices=jax.devices()[:1]),
      )
      states.append(trainer.fit([batch_of()], steps=1, params=start))
    assert_close(
      restacked(states[0].params, scanned), states[1].params,
      rtol=1e-3, atol=1e-4,
    )  # fmt: skip

  def test_config_json_tells_of_it_only_where_it_is_so(self):
    plain = models.describe(family('lm', remat_policy='full').module)
    self.assertNoCommonElements(
      plain, ['scan_layers', 'param_scan_axis', 'remat_policy']
    )
    scanned = family('lm', scan_layers=True, param_scan_axis=0).module
    told = json.loads(json.dumps(models.describe(scanned)))
    self.assertEqual(models.build(told), scanned)


class RestackTest(parameterized.TestCase):
  @FORMS
  def test_there_and_back_is_the_same(self, kind, axis, per_layer):
    apart = family(kind, relative_per_layer=per_layer)
    params = tree.flatten(drawn.params(apart))
    scanned = dataclasses.replace(
      apart.config, scan_layers=True, param_scan_axis=axis
    )
    there = layer_stacks.restack(params, scanned)
    back = layer_stacks.restack(there, apart.config)
    self.assertEqual(back.keys(), params.keys())
    for path, leaf in params.items():
      np.testing.assert_array_equal(back[path], leaf)

  def test_one_table_serves_layers_that_have_their_own(self):
    shared, own = family('t5'), family('t5', relative_per_layer=True)
    params = drawn.params(shared)
    tables = restacked(params, own)
    batch = batch_of()
    np.testing.assert_array_equal(
      jax.jit(own.logits)(tables, batch), jax.jit(shared.logits)(params, batch)
    )
    assert_close(params, restacked(tables, shared), rtol=0)
    bias = tables['encoder']['layers_1']['relpos_bias']
    bias['rel_embedding'] = bias['rel_embedding'] + 1
    with self.assertRaisesRegex(errors.UserError, 'relative_per_layer=True'):
      restacked(tables, shared)

  def test_axis_of_layers(self):
    config = t5.T5Config()
    leaves = {
      'encoder/encoder/mlp/wi/kernel': np.zeros((4, 4, 5)),
      'encoder/encoder/mlp/wo/kernel': np.zeros((4, 4, 3)),
    }
    with self.assertRaisesRegex(errors.UserError, '0 or 1 would fit'):
      layer_stacks.restack(leaves, config)
    axes = {'encoder/encoder/mlp/wi/kernel': ('layers', 'embed', 'mlp')}
    found = layer_stacks.restack(leaves, config, axes)
    self.assertEqual(found['encoder/layers_3/mlp/wi/kernel'].shape, (4, 5))
    axes = {'encoder/encoder/mlp/wi/kernel': ('embed', 'mlp', 'layers')}
    with self.assertRaisesRegex(errors.UserError, '2 would fit'):
      layer_stacks.restack(leaves, config, axes)


class RematTest(parameterized.TestCase):
  def test_the_numbers_stay(self):
    self.check_remat('full', False)

  @parameterized.parameters('dots_saveable', 'full')
  @pytest.mark.slow
  def test_the_numbers_stay_of_scanned_layers(self, policy):
    self.check_remat(policy, True)

  def check_remat(self, policy, scan):
    plain = family('lm', scan_layers=scan)
    remat = family('lm', scan_layers=scan, remat_policy=policy)
    params, batch = drawn.params(plain), batch_of()
    _, loss, gradient = logits_loss_and_gradient(plain, params, batch)
    _, other, found = logits_loss_and_gradient(remat, params, batch)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert_close(gradient, found, rtol=1e-4, atol=1e-6)

  def test_less_is_kept(self):
    sizes = {}
    for policy in ('none', 'minimal', 'full'):
      model = family('t5', scan_layers=True, remat_policy=policy)
      loss = loss_of(model, batch_of(4, 16))
      backward = lambda params, loss=loss: jax.vjp(loss, params)[1]
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      kept = jax.tree.leaves(jax.eval_shape(backward, shapes))
      sizes[policy] = sum(leaf.size for leaf in kept)
    self.assertLess(sizes['minimal'], sizes['none'])
    self.assertLess(sizes['full'], sizes['minimal'])

  def test_mistakes(self):
    for changes, said in (
      ({'remat_policy': 'ful'}, "'ful'.*'?full"),
      # It makes a policy, and is none.
      ({'remat_policy': 'save_only_these_names'}, 'Unknown remat policy'),
      ({'mlp_activations': ('geluu',)}, "Unknown activation .*'gelu'"),
      ({'scan_layers': True, 'param_scan_axis': -1}, '0 or 1, not -1'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, said):
        family('lm', **changes).init(jax.random.key(0))


class WatchedTest(parameterized.TestCase):
  """Layers in one are watched as layers one by one are."""

  def batch(self):
    batch = batch_of()
    batch['encoder_input_tokens'][1, 2:] = 0
    return batch

  def test_gram_matrices(self):
    self.check_grams('lm', 1, 'full')

  @parameterized.parameters(('t5', 1, 'none'), ('lm', 0, 'full'))
  @pytest.mark.slow
  def test_gram_matrices_of_further_forms(self, kind, axis, remat):
    self.check_grams(kind, axis, remat)

  def check_grams(self, kind, axis, remat):
    apart = family(kind)
    scanned = family(
      kind, scan_layers=True, param_scan_axis=axis, remat_policy=remat
    )
    params = drawn.params(apart)
    collect = lambda model, params: statistics.collect(
      statistics.gram(), model, params, [self.batch()]
    )
    expected = collect(apart, params)
    found = collect(scanned, restacked(params, scanned))
    # Whatever the axis of parameters is, statistics have their layers in front.
    front = dataclasses.replace(scanned.config, param_scan_axis=0)
    for name in ('gram', 'count'):
      wanted = {path: own[name] for path, own in expected.items()}
      given = {path: own[name] for path, own in found.items()}
      wanted = layer_stacks.restack(wanted, front)
      assert_close(wanted, given, rtol=1e-4, atol=1e-5)
    specs = scanned.specs()
    for path, own in found.items():
      gram = statistic_specs.GRAM
      self.assertTrue(gram.fits(own['gram'].shape, path, specs[path]), path)

  def test_features_are_what_the_encoder_says(self):
    self.check_features(scan=True)

  @pytest.mark.slow
  def test_features_are_what_the_encoder_says_layer_by_layer(self):
    self.check_features(scan=False)

  def check_features(self, scan):
    model = family('t5', scan_layers=scan, logits_via_embedding=True)
    params, batch = drawn.params(model), self.batch()
    inputs = batch['encoder_input_tokens']
    encode = lambda params, inputs: model.module.apply(
      {'params': params}, inputs, method='encode'
    )
    encoded = jax.jit(encode)(params, inputs)
    real = (inputs > 0)[..., None]
    np.testing.assert_allclose(
      select.extract(model, params, [batch]),
      np.where(real, encoded, 0).sum(axis=1) / real.sum(axis=1),
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
