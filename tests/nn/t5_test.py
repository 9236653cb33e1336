# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5 against T5X's and the transformers library's own numbers."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiers

from mergejax import models
from mergejax.core import axes
from mergejax.core import tree
from mergejax.models import t5_hf as t5_names
from mergejax.names import t5x
from mergejax.nn import attention
from mergejax.nn import t5
from mergejax.training import losses
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import step as step_lib

VERSIONS = {
  't5x_network_v1_1': {},
  't5x_network_v1_0': dict(
    mlp_activations=('relu',), logits_via_embedding=True
  ),
}


def tiny(version, **changes):
  config = t5.T5Config(
      vocab_size=64, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
      num_encoder_layers=2, num_decoder_layers=2,
      **VERSIONS[version] | changes,
  )  # fmt: skip
  return t5.Transformer(config)


def batch_of(arrays, prefix='batch/'):
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix) and 'logits' not in name
  }


def encode(module, params, inputs):
  run = lambda params, inputs: module.apply(
    {'params': params}, inputs, method='encode'
  )
  return jax.jit(run)(params, inputs)


@tiers.slow('test_packed_logits1', 'test_score1', 'test_cached_decoding_.*[12]')
class T5XTest(parameterized.TestCase):
  @parameterized.parameters(*VERSIONS)
  def test_parameter_tree_is_t5x_s(self, version):
    arrays = goldens.load(version)
    module = tiny(version)
    tokens = jnp.ones((1, 3), jnp.int32)
    params = jax.eval_shape(
      lambda: module.init(jax.random.key(0), tokens, tokens, tokens)
    )['params']
    self.assertEmpty(
      tree.difference(
        tree.specs(goldens.subtree(arrays, 'params/')), tree.specs(params)
      )
    )

  @parameterized.parameters(*VERSIONS)
  def test_logical_axes_are_t5x_s(self, version):
    arrays = goldens.load(version)
    specs = tree.specs(goldens.subtree(arrays, 'params/'))
    found = axes.logical_axes(specs, t5x.AXES)
    expected = {
      str(name).removesuffix('_axes'): tuple(str(value).split(','))
      for name, value in zip(arrays['axes_names'], arrays['axes_values'])
    }
    self.assertEqual(found, expected)

  @parameterized.parameters(*VERSIONS)
  def test_logits_and_encoding(self, version):
    arrays = goldens.load(version)
    module, params = tiny(version), goldens.subtree(arrays, 'params/')
    batch = batch_of(arrays)
    logits = jax.jit(models.family_of(module).logits)(params, batch)
    np.testing.assert_allclose(logits, arrays['logits'], rtol=1e-4, atol=2e-5)
    encoded = encode(module, params, batch['encoder_input_tokens'])
    np.testing.assert_allclose(encoded, arrays['encoded'], rtol=1e-4, atol=1e-5)

  @parameterized.parameters(*VERSIONS)
  def test_packed_logits(self, version):
    arrays = goldens.load(version)
    logits = jax.jit(models.family_of(tiny(version)).logits)(
      goldens.subtree(arrays, 'params/'), batch_of(arrays, 'packed/')
    )
    np.testing.assert_allclose(
      logits, arrays['packed/logits'], rtol=1e-4, atol=1e-5
    )

  @parameterized.parameters(*VERSIONS)
  def test_losses(self, version):
    arrays = goldens.load(version)
    targets = arrays['batch/decoder_target_tokens']
    weights = arrays['loss/weights']
    settings = {
      'plain': (0.0, 0.0, None),
      'z': (0.0, 1e-4, None),
      'z1e-2': (0.0, 1e-2, None),
      'ls0.1': (0.1, 0.0, None),
      'ls0.1_z_tok': (0.1, 1e-4, 'NUM_REAL_TARGET_TOKENS'),
    }
    for name, (smoothing, z_loss, kind) in settings.items():
      loss, z_part = losses.token_cross_entropy(
        arrays['logits'], targets, z_loss=z_loss, label_smoothing=smoothing
      )
      factor, scaled = losses.normalizer(kind, targets, weights)
      found = [
        jnp.sum(loss * scaled) / factor,
        jnp.sum(z_part * scaled) / factor,
        jnp.sum(weights),
      ]
      np.testing.assert_allclose(
        found, arrays[f'loss/{name}'], rtol=1e-5, atol=1e-6, err_msg=name
      )
    for kind in losses.NORMALIZERS:
      factor, scaled = losses.normalizer(
        kind, targets, (targets > 0).astype(np.float32)
      )
      np.testing.assert_allclose(
        factor, arrays[f'lnf/{kind}/factor'], rtol=1e-6
      )
      np.testing.assert_allclose(
        scaled, arrays[f'lnf/{kind}/weights'], rtol=1e-6
      )

  @parameterized.parameters(*VERSIONS)
  def test_score(self, version):
    arrays = goldens.load(version)
    batch = batch_of(arrays)
    likelihood = functools.partial(losses.token_log_likelihood, tiny(version))
    lp = jax.jit(likelihood)(goldens.subtree(arrays, 'params/'), batch)
    real = batch['decoder_target_tokens'] > 0
    np.testing.assert_allclose(
      np.where(real, lp, 0).sum(axis=1), arrays['score'], rtol=1e-5
    )

  @parameterized.parameters(
    ('t5x_network_v1_1', 'decode', None),
    ('t5x_network_v1_1', '__call__', 9),
    ('t5x_network_v1_0', '__call__', None),
  )
  def test_cached_decoding_equals_the_full_forward(
    self, version, by, max_decode_length
  ):
    module = tiny(version, relative_buckets=4, relative_max_distance=5)
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 64, (2, 5)).astype(np.int32)
    inputs[1, 3:] = 0
    targets = rng.integers(2, 64, (2, 9)).astype(np.int32)
    params = jax.jit(module.init)(jax.random.key(0), inputs, targets, targets)[
      'params'
    ]
    for stack in ('encoder', 'decoder'):
      bias = params[stack]['relpos_bias']
      bias['rel_embedding'] = 3.0 * jax.random.normal(
        jax.random.key(2), bias['rel_embedding'].shape
      )
    encoded = encode(module, params, inputs)
    first = (encoded, inputs) if by == 'decode' else (inputs,)

    @functools.partial(
      jax.jit, static_argnames=['decode', 'mutable', 'max_decode_length']
    )
    def apply(cache, tokens, **named):
      return module.apply(
          {'params': params, **cache}, *first, tokens, jnp.ones_like(tokens),
          method=by, **named,
      )  # fmt: skip

    full = apply({}, targets)
    named = dict(decode=True, mutable='cache')
    if max_decode_length:
      named['max_decode_length'] = max_decode_length
    made, cache = apply({}, targets, **named)
    np.testing.assert_allclose(made, full, rtol=1e-5, atol=1e-5)
    for i in range(9):
      logits, cache = apply(cache, targets[:, i : i + 1], **named)
      np.testing.assert_allclose(logits[:, 0], full[:, i], rtol=1e-5, atol=1e-5)

  def test_relative_position_buckets(self):
    arrays = goldens.load('t5_relative_position')
    checked = 0
    for name, expected in arrays.items():
      if not name.startswith('bucket/'):
        continue
      _, sizes, direction = name.split('/')
      buckets, distance = sizes.removeprefix('nb').split('_md')
      found = attention.relative_position_bucket(
        arrays['relative_position'],
        bidirectional=direction == 'bidirectional',
        num_buckets=int(buckets),
        max_distance=int(distance),
      )
      np.testing.assert_array_equal(found, expected, err_msg=name)
      checked += 1
    self.assertEqual(checked, 8)

  def test_initial_scales(self):
    module = t5.Transformer(
        t5.T5Config(vocab_size=64, emb_dim=64, num_heads=4, head_dim=16,
                    mlp_dim=256, num_encoder_layers=1, num_decoder_layers=1)
    )  # fmt: skip
    tokens = jnp.ones((1, 3), jnp.int32)
    made = jax.jit(module.init)(jax.random.key(0), tokens, tokens, tokens)
    params = tree.flatten(made['params'])
    expected = {
      'token_embedder/embedding': 1.0,
      'encoder/layers_0/attention/query/kernel': 1 / np.sqrt(64 * 16),
      'encoder/layers_0/attention/key/kernel': 1 / np.sqrt(64),
      'encoder/layers_0/attention/out/kernel': 1 / np.sqrt(64),
      'encoder/layers_0/mlp/wi_0/kernel': 1 / np.sqrt(64),
      'decoder/layers_0/mlp/wo/kernel': 1 / np.sqrt(256),
    }
    for path, std in expected.items():
      np.testing.assert_allclose(np.std(params[path]), std, rtol=0.1)


class StepsTest(absltest.TestCase):
  """What costs more than one forward pass."""

  version = 't5x_network_v1_1'

  def test_packed_rows_equal_their_segments_alone(self):
    arrays = goldens.load(self.version)
    module, params = tiny(self.version), goldens.subtree(arrays, 'params/')
    packed = batch_of(arrays, 'packed/')
    logits = jax.jit(models.family_of(module).logits)
    whole = logits(params, packed)

    def padded(name, row, chosen):
      """A segment alone in its row: one shape, compiled once."""
      tokens = packed[name][row]
      alone = tokens[chosen]
      return np.pad(alone, (0, len(tokens) - len(alone)))[None]

    checked = 0
    for row in range(3):
      for segment in range(
        1, int(packed['decoder_segment_ids'][row].max()) + 1
      ):
        inside = packed['encoder_segment_ids'][row] == segment
        targets = packed['decoder_segment_ids'][row] == segment
        alone = logits(params, {
            name: padded(name, row, chosen)
            for name, chosen in (
                ('encoder_input_tokens', inside),
                ('decoder_input_tokens', targets),
                ('decoder_target_tokens', targets),
            )
        })  # fmt: skip
        np.testing.assert_allclose(
          whole[row][targets], alone[0, : targets.sum()], rtol=1e-4, atol=1e-5
        )
        checked += 1
    self.assertGreater(checked, 3)

  def test_bfloat16_is_close(self):
    arrays = goldens.load(self.version)
    module = tiny(self.version, dtype='bfloat16')
    logits = jax.jit(models.family_of(module).logits)(
      goldens.subtree(arrays, 'params/'), batch_of(arrays)
    )
    self.assertEqual(logits.dtype, jnp.float32)
    real = arrays['batch/decoder_target_tokens'] > 0
    spread = np.abs(arrays['logits_bf16'] - arrays['logits'])[real].max()
    off = np.abs(logits - arrays['logits'])[real].max()
    self.assertLess(off, 2 * spread)

  def test_gradients_and_three_adafactor_steps(self):
    arrays = goldens.load(self.version)
    module, params = tiny(self.version), goldens.subtree(arrays, 'params/')
    batch = batch_of(arrays)
    summed = objective.cross_entropy(z_loss=1e-4, normalizing_factor=None)
    loss_fn = objective.make_loss(module, summed)
    graded = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), grads = graded(params, batch)
    np.testing.assert_allclose(loss, arrays['train/loss0'], rtol=1e-5)
    for path, leaf in tree.flatten(grads).items():
      np.testing.assert_allclose(
        leaf, arrays[f'grad/{path}'], rtol=1e-3, atol=1e-4, err_msg=path
      )
    optimizer = optim.adafactor(0.01)
    made = step_lib.make_step(module, optimizer, objective=summed)
    state = made.init(params, jax.random.key(0))
    step = jax.jit(made.update)
    seen = []
    for _ in range(3):
      seen.append(graded(state.params, batch)[0][0])
      state, _ = step(state, batch)
    seen.append(graded(state.params, batch)[0][0])
    np.testing.assert_allclose(seen, arrays['train/losses'], rtol=1e-4)
    after = goldens.subtree(arrays, 'train/params_after3/')
    for path, leaf in tree.flatten(after).items():
      np.testing.assert_allclose(
          tree.flatten(state.params)[path], leaf, rtol=1e-4, atol=1e-5,
          err_msg=path,
      )  # fmt: skip

  def test_greedy_decoding_with_the_cache(self):
    arrays = goldens.load(self.version)
    module, params = tiny(self.version), goldens.subtree(arrays, 'params/')
    inputs = arrays['batch/encoder_input_tokens']
    expected = arrays['decode/greedy']
    length = expected.shape[1]
    encoded = encode(module, params, inputs)
    blank = jnp.zeros((3, length), jnp.int32)

    @functools.partial(jax.jit, static_argnames=['decode'])
    def run(cache, token, mask, decode=True):
      length_too = dict(max_decode_length=length) if decode else {}
      return module.apply(
          {'params': params, **cache}, encoded, inputs, token, mask,
          decode=decode, method='decode', mutable=['cache'], **length_too,
      )  # fmt: skip

    _, cache = run({}, blank, blank)
    token, alive, tokens, steps = blank[:, :1], np.ones(3, bool), [], []
    for _ in range(length):
      logits, cache = run(cache, token, token)
      steps.append(np.asarray(logits[:, 0]))
      chosen = np.where(alive, np.argmax(logits[:, 0], axis=-1), 0)
      tokens.append(chosen)
      alive &= chosen != 1
      token = jnp.asarray(chosen[:, None], jnp.int32)
    tokens = np.stack(tokens, axis=1)
    np.testing.assert_array_equal(tokens, expected)
    # Step by step equals the full forward over the same tokens.
    shifted = np.concatenate([np.zeros((3, 1), np.int32), tokens[:, :-1]], 1)
    full, _ = run({}, shifted, np.ones_like(tokens), decode=False)
    np.testing.assert_allclose(
      np.stack(steps, axis=1), full, rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
class OlderStepsTest(StepsTest):
  version = 't5x_network_v1_0'


class HuggingFaceTest(parameterized.TestCase):
  @parameterized.parameters('t5_v10_relu_tied', 't5_v11_gated_untied')
  def test_logits_and_token_loss(self, name):
    arrays = goldens.load(name)
    config = {
      k.removeprefix('config/'): v.item()
      for k, v in arrays.items()
      if k.startswith('config/')
    }
    tied = 'tied' in name.split('_')
    config['feed_forward_proj'] = 'relu' if tied else 'gated-gelu'
    config['tie_word_embeddings'] = tied
    module = t5.Transformer(t5.T5Config(**t5_names.config_from_hf(config)))
    stored = {
      k.removeprefix('params/'): v
      for k, v in arrays.items()
      if k.startswith('params/')
    }
    leaves = t5_names.from_hf(stored, tied_head=tied)
    params = tree.unflatten(leaves)
    inputs, decoder_inputs = arrays['input_ids'], arrays['decoder_input_ids']
    # There the decoder masks nothing but the future.
    logits = jax.jit(module.apply)(
      {'params': params}, inputs, decoder_inputs, np.ones_like(decoder_inputs)
    )
    np.testing.assert_allclose(logits, arrays['logits'], rtol=1e-4, atol=2e-5)
    counted = arrays['labels'] != -100
    loss, _ = losses.token_cross_entropy(
      logits, np.where(counted, arrays['labels'], 0)
    )
    np.testing.assert_allclose(
      np.where(counted, loss, 0), arrays['token_loss'], rtol=1e-4, atol=2e-5
    )
    encoded = encode(module, params, inputs)
    real = inputs > 0
    np.testing.assert_allclose(
      encoded[real],
      arrays['encoder_last_hidden_state'][real],
      rtol=1e-4,
      atol=2e-5,
    )
    back = t5_names.to_hf(leaves)
    self.assertEqual(set(back), set(stored))
    for key, leaf in back.items():
      np.testing.assert_array_equal(leaf, stored[key], err_msg=key)


if __name__ == '__main__':
  absltest.main()
