# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5: encoder-decoders with T5X's parameter names and call signature."""

import re

import jax
import jax.numpy as jnp

from mergejax.models import lm
from mergejax.models import registry
from mergejax.models import t5_hf
from mergejax.nn import t5

# What reads the encoder's positions: the encoder, and the keys and values of
# cross-attention.
_READS_INPUTS = re.compile(
  r'(.*/)?(encoder/.*|encoder_decoder_attention/(key|value)/.*)'
)


@registry.register
class T5Family(lm.TextFamily):
  """T5 1.0 and 1.1, mT5, ByT5, umT5; batches also have `encoder_input_tokens`."""

  model_type = 't5x'
  config_class = t5.T5Config
  module_class = t5.Transformer
  optional = ('encoder_segment_ids', 'decoder_segment_ids')
  decodes = True
  answers = True
  embedded = ('encoder', 'argument')
  conversions = t5_hf.CONVERSIONS

  def arguments(self, batch, *, train=False):
    positional, named = super().arguments(batch, train=train)
    return [batch['encoder_input_tokens'], *positional], named

  def example_batch(self, rows=1, *, length=1):
    batch = super().example_batch(rows, length=length)
    return {**batch, 'encoder_input_tokens': batch['decoder_input_tokens']}

  def with_room(self, batch, length):
    lm.check_unpacked(batch, 'encoder_segment_ids')
    return lm.with_ones(batch, ('encoder_input_tokens',), length)

  def mask(self, path, batch):
    of_decoder = super().mask(path, batch)
    if isinstance(of_decoder, str) or not _READS_INPUTS.fullmatch(path):
      return of_decoder
    return batch['encoder_input_tokens'] > 0

  def features_layer(self, specs):
    # What every cross-attention is given: the encoder's output.
    del specs
    layer = 'decoder' if self.scanned else 'layers_0'
    return f'decoder/{layer}/encoder_decoder_attention/key/kernel'

  def init_cache(self, params, batch, length):
    inputs = batch['encoder_input_tokens']
    variables = self.variables(params)
    encoded = self.module.apply(
      variables, inputs, method=self.module_class.encode
    )
    empty = jnp.ones((inputs.shape[0], length), jnp.int32)
    # Of this pass nothing is kept but the keys and values of `encoded`: a
    # compiled program leaves the rest out.
    _, made = self.module.apply(
      variables, encoded, inputs, empty, empty, decode=True,
      max_decode_length=length, mutable=['cache', 'encoded'],
      method=self.module_class.decode,
    )  # fmt: skip
    return {'inputs': inputs, 'encoder_output': encoded, **made}

  def decode_step(self, params, cache, tokens):
    row = tokens[:, None]
    kept = {name: cache[name] for name in ('cache', 'encoded')}
    found, changed = self.module.apply(
      {**self.variables(params), **kept},
      cache['encoder_output'], cache['inputs'], row, row, decode=True,
      mutable=['cache'], method=self.module_class.decode,
    )  # fmt: skip
    return found[:, 0], {**cache, 'cache': changed['cache']}

  def choice_logits(self, variables, batch, choices, *, train=False, rngs=None):
    inputs = batch['encoder_input_tokens']
    drop = bool(rngs) and bool(self.rng_streams(train=train))
    run = lambda method, *args: self.module.apply(
      variables, *args, enable_dropout=drop, rngs=rngs, method=method
    )
    encoded = run(self.module_class.encode, inputs)
    count = choices.shape[1]
    each = lambda x: jnp.repeat(x, count, axis=0)
    rows = choices.reshape(-1, choices.shape[-1])
    shifted = jnp.pad(rows, ((0, 0), (1, 0)))[:, :-1]
    found = run(
      self.module_class.decode, each(encoded), each(inputs), shifted, rows
    )
    return found.reshape(*choices.shape, found.shape[-1])

  def answer_logits(self, answers):
    answers = jnp.asarray(answers, jnp.int32)
    module = self.module

    def fn(params, batch):
      inputs = batch['encoder_input_tokens']
      encoded = module.apply(
        {'params': params}, inputs, method=type(module).encode
      )

      def score(answer):
        tokens = jnp.broadcast_to(answer, (len(inputs), len(answer)))
        shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
        given = module.apply(
          {'params': params}, encoded, inputs, shifted, tokens,
          method=type(module).decode,
        )  # fmt: skip
        log_p = jax.nn.log_softmax(given.astype(jnp.float32))
        picked = jax.nn.one_hot(tokens, log_p.shape[-1], dtype=log_p.dtype)
        real = (tokens > 0).astype(log_p.dtype)[..., None]
        return jnp.sum(log_p * picked * real, axis=(1, 2))

      return jax.lax.map(score, answers).T

    return fn
