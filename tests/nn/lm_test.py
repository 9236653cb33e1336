# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0

import functools

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import jax
import jax.numpy as jnp
import numpy as np
import tiers

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import lm


def tiny(**changes):
  config = dict(
      vocab_size=20, emb_dim=8, num_heads=2, head_dim=4, num_layers=2,
      mlp_dim=16,
  )  # fmt: skip
  module = lm.LanguageModel(lm.LMConfig(**config | changes))
  return module, drawn.params(models.family_of(module))


@functools.cache
def jitted(module):
  return jax.jit(module.apply)


@tiers.slow('test_cached_decoding_.*0', 'test_the_future_.*1')
class LanguageModelTest(parameterized.TestCase):
  def test_names_are_those_of_t5x_s_decoder_only_model(self):
    _, params = tiny()
    paths = set(tree.flatten(params))
    for path in (
      'decoder/token_embedder/embedding',
      'decoder/relpos_bias/rel_embedding',
      'decoder/layers_1/pre_self_attention_layer_norm/scale',
      'decoder/layers_1/self_attention/query/kernel',
      'decoder/layers_1/pre_mlp_layer_norm/scale',
      'decoder/layers_1/mlp/wi_0/kernel',
      'decoder/decoder_norm/scale',
      'decoder/logits_dense/kernel',
    ):
      self.assertIn(path, paths)

  @parameterized.parameters(False, True)
  def test_the_future_is_not_seen(self, tied):
    module, params = tiny(logits_via_embedding=tied)
    tokens = np.array([[0, 3, 4, 5, 6, 7]])
    targets = np.ones_like(tokens)
    before = jitted(module)({'params': params}, tokens, targets)
    tokens[0, 4] = 9
    after = jitted(module)({'params': params}, tokens, targets)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    self.assertGreater(np.abs(before[:, 4:] - after[:, 4:]).max(), 1e-3)

  def test_a_prefix_sees_itself(self):
    module, params = tiny()
    tokens = np.array([[0, 3, 4, 5, 6, 7]])
    targets = np.ones_like(tokens)
    prefix = np.array([[1, 1, 1, 0, 0, 0]])
    apply = lambda t: jitted(module)(
      {'params': params}, t, targets, decoder_causal_attention=prefix
    )
    before = apply(tokens)
    tokens[0, 2] = 9
    inside = np.abs(before - apply(tokens))[0].max(axis=-1)
    self.assertGreater(inside[0], 1e-4)

  def test_packed_rows_equal_their_segments_alone(self):
    module, params = tiny()
    inputs = np.array([[0, 3, 4, 0, 6, 7, 0, 0]])
    targets = np.array([[3, 4, 5, 6, 7, 8, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
    packed = jitted(module)({'params': params}, inputs, targets, segments)
    for part in (slice(0, 3), slice(3, 6)):
      alone = jitted(module)(
        {'params': params}, inputs[:, part], targets[:, part]
      )
      np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-6)

  def test_padding_changes_nothing(self):
    module, params = tiny()
    inputs, targets = np.array([[0, 3, 4]]), np.array([[3, 4, 5]])
    padded = lambda x: np.pad(x, [(0, 0), (0, 3)])
    short = jitted(module)({'params': params}, inputs, targets)
    long = jitted(module)({'params': params}, padded(inputs), padded(targets))
    np.testing.assert_allclose(long[:, :3], short, rtol=1e-5, atol=1e-6)

  @parameterized.parameters((None, False), (7, True))
  def test_cached_decoding_equals_the_full_forward(
    self, max_decode_length, tied
  ):
    # Four buckets up to distance 5: positions far apart share a bucket, so a
    # bias of another length than the cache's is seen in the logits.
    module, params = tiny(
      logits_via_embedding=tied, relative_buckets=4, relative_max_distance=5
    )
    bias = params['decoder']['relpos_bias']
    bias['rel_embedding'] = 3.0 * jax.random.normal(
      jax.random.key(2), bias['rel_embedding'].shape
    )
    tokens = np.random.default_rng(0).integers(3, 20, (2, 7))
    full = jitted(module)({'params': params}, tokens, np.ones_like(tokens))
    decode = lambda cache, some: module.apply(
        {'params': params, **cache}, some, jnp.ones_like(some), decode=True,
        max_decode_length=max_decode_length, mutable='cache',
    )  # fmt: skip
    compiled = jax.jit(decode)
    made, cache = compiled({}, tokens)
    np.testing.assert_allclose(made, full, rtol=1e-5, atol=1e-5)
    for i in range(7):
      logits, cache = compiled(cache, tokens[:, i : i + 1])
      np.testing.assert_allclose(logits[:, 0], full[:, i], rtol=1e-5, atol=1e-5)

    with self.assertRaisesRegex(errors.UserError, 'one position'):
      decode(cache, tokens)
    # The cache is full: an eighth position has no place in it.
    with self.assertRaisesRegex(errors.UserError, '7 positions'):
      decode(cache, tokens[:, :1])
    logits, _ = compiled(cache, tokens[:, :1])
    self.assertTrue(np.isnan(logits).all())

  def test_what_a_cache_cannot_do_is_refused(self):
    module, params = tiny()
    tokens = jnp.ones((1, 4), jnp.int32)
    decode = lambda cache, some, **named: module.apply(
        {'params': params, **cache}, some, some, decode=True,
        mutable='cache', **named,
    )  # fmt: skip
    with self.assertRaisesRegex(errors.UserError, 'cache of 4 .* 9'):
      decode({}, tokens, max_decode_length=9)
    _, cache = decode({}, tokens)
    with self.assertRaisesRegex(errors.UserError, 'cache of 4 .* 9'):
      decode(cache, tokens[:, :1], max_decode_length=9)
    for name in ('decoder_segment_ids', 'decoder_causal_attention'):
      with self.assertRaisesRegex(errors.UserError, name):
        decode(cache, tokens[:, :1], **{name: tokens[:, :1]})

  def test_dropout_is_drawn_from_the_key(self):
    module, params = tiny(dropout_rate=0.5)
    tokens = np.array([[3, 4, 5]])
    batch = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens}
    family = models.family_of(module)
    draw = lambda i: family.apply(
      family.variables(params), batch, train=True,
      rngs={'dropout': jax.random.key(i)},
    ).logits  # fmt: skip
    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertGreater(np.abs(draw(0) - draw(1)).max(), 1e-3)


if __name__ == '__main__':
  absltest.main()
