# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5 1.0 and 1.1, encoder-decoder, with T5X's names, shapes and signature.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683; 1.1 adds gated
GELU (Shazeer, 2020, https://arxiv.org/abs/2002.05202) and an untied head. The
parameter tree is that of T5X's `examples/t5/network.py`.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mergejax.core import typing
from mergejax.nn import attention
from mergejax.nn import transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(transformer.StackConfig):
  """Sizes of an encoder-decoder; the defaults are T5 1.1 small.

  Attributes:
    vocab_size: 32128 is 32000 pieces, 100 sentinels and padding to a multiple
      of 128.
    num_encoder_layers: layers of the encoder.
    num_decoder_layers: layers of the decoder.
  """

  vocab_size: int = 32128
  num_encoder_layers: int = 8
  num_decoder_layers: int = 8

  def __post_init__(self):
    super().__post_init__()
    self.sparse_layers(self.num_encoder_layers, decoder=False)
    self.sparse_layers(self.num_decoder_layers, decoder=True)


class Transformer(nn.Module):
  """T5 encoder-decoder: tokens in, logits out.

  Call it as T5X's `Transformer`. Token 0 is padding on both sides. Packed rows
  carry segment ids; positions are accepted and ignored, because attention is
  relative and segments are contiguous.

  Example:
    >>> config = T5Config(vocab_size=32, emb_dim=8, num_heads=2, head_dim=4,
    ...                   num_encoder_layers=1, num_decoder_layers=1, mlp_dim=16)
    >>> tokens = jnp.array([[5, 6, 1, 0]])
    >>> model = Transformer(config)
    >>> params = model.init(jax.random.key(0), tokens, tokens, tokens)['params']
    >>> model.apply({'params': params}, tokens, tokens, tokens).shape
    (1, 4, 32)
  """

  config: T5Config

  def setup(self):
    self.token_embedder = transformer.token_embedder(self.config)
    self.encoder = transformer.Encoder(
      self.config, self.config.num_encoder_layers
    )
    self.decoder = transformer.Decoder(
      self.config, self.config.num_decoder_layers, self.token_embedder
    )

  def encode(
    self,
    encoder_input_tokens: typing.Array,
    encoder_segment_ids: typing.Array | None = None,
    enable_dropout: bool = False,
  ) -> typing.Array:
    """Encodes tokens.

    Args:
      encoder_input_tokens: `<int32>[batch, length]`, 0 is padding.
      encoder_segment_ids: `<int32>[batch, length]` of packed rows, or None.
      enable_dropout: draw dropout from the rng stream `dropout`.

    Returns:
      `<dtype>[batch, length, embed]`. Values at padding are arbitrary.
    """
    real = encoder_input_tokens > 0
    bias = attention.attention_bias(
      attention.pair_mask(real, real),
      attention.segment_mask(encoder_segment_ids, encoder_segment_ids),
    )
    embedded = self.token_embedder(encoder_input_tokens)
    return self.encoder(
      embedded, bias, deterministic=not enable_dropout,
      real=None if self.config.moe is None else real,
    )  # fmt: skip

  def decode(
    self,
    encoded: typing.Array,
    encoder_input_tokens: typing.Array,
    decoder_input_tokens: typing.Array,
    decoder_target_tokens: typing.Array,
    encoder_segment_ids: typing.Array | None = None,
    decoder_segment_ids: typing.Array | None = None,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> typing.Array:
    """Decodes against encoded inputs.

    Args:
      encoded: `<dtype>[batch, length, embed]` from `encode`.
      encoder_input_tokens: `<int32>[batch, length]`, for the padding mask.
      decoder_input_tokens: `<int32>[batch, target]`, targets shifted right with
        0 first (at the start of every segment when packed).
      decoder_target_tokens: `<int32>[batch, target]`; T5X takes the padding
        mask from the targets, not from the inputs, and so do we.
      encoder_segment_ids: `<int32>[batch, length]` of packed rows, or None.
      decoder_segment_ids: `<int32>[batch, target]`, or None.
      enable_dropout: draw dropout from the rng stream `dropout`.
      decode: use the collection `cache`. The first call makes it, as long as
        its tokens; every later one takes the next position. A first call that
        may also write the collection `encoded` keeps there what attention makes
        of `encoded`; given it, later calls do not compute that anew, and may
        have several rows of tokens to a row of inputs.
      max_decode_length: length of that cache, to have it checked; T5X's.

    Returns:
      `<float32>[batch, target, vocab]` logits.

    Raises:
      UserError: a call that does not fit its cache, or `decode` of packed rows.
    """
    attention.check_decoding(decode, decoder_segment_ids=decoder_segment_ids)
    inputs_real = encoder_input_tokens > 0
    if decode:
      # Of every query: there may be several answers to an input.
      mask_bias, targets_real = None, jnp.ones_like(inputs_real[:, :1])
      real = None
    else:
      targets_real = real = decoder_target_tokens > 0
      mask_bias = attention.attention_bias(
        attention.pair_mask(targets_real, targets_real),
        attention.causal_mask(decoder_input_tokens.shape[1]),
        attention.segment_mask(decoder_segment_ids, decoder_segment_ids),
      )
    cross_bias = attention.attention_bias(
      attention.pair_mask(targets_real, inputs_real),
      attention.segment_mask(decoder_segment_ids, encoder_segment_ids),
    )
    return self.decoder(
      decoder_input_tokens,
      encoded,
      mask_bias,
      cross_bias,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
      real=None if self.config.moe is None else real,
    )

  def __call__(
    self,
    encoder_input_tokens: typing.Array,
    decoder_input_tokens: typing.Array,
    decoder_target_tokens: typing.Array,
    encoder_segment_ids: typing.Array | None = None,
    decoder_segment_ids: typing.Array | None = None,
    encoder_positions: typing.Array | None = None,
    decoder_positions: typing.Array | None = None,
    *,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> typing.Array:
    """`decode(encode(...))`; see both. T5X enables dropout here by default."""
    del encoder_positions, decoder_positions
    encoded = self.encode(
      encoder_input_tokens, encoder_segment_ids, enable_dropout
    )
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      encoder_segment_ids,
      decoder_segment_ids,
      enable_dropout,
      decode,
      max_decode_length,
    )
