# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoder-only language model with the layers and names of T5's decoder.

The parameter tree is that of T5X's `examples/decoder_only/network.py`: the
same as T5's decoder without cross-attention, the embedding inside it
(`decoder/token_embedder/embedding`).
"""

import dataclasses

import flax.linen as nn

from mergejax.core import errors
from mergejax.core import typing
from mergejax.nn import attention
from mergejax.nn import transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(transformer.StackConfig):
  """Sizes of a decoder-only model.

  Attributes:
    vocab_size: 259 is seqio's byte vocabulary: padding, end and unknown, then
      the 256 bytes.
    num_layers: layers.
  """

  vocab_size: int = 259
  num_layers: int = 8

  def __post_init__(self):
    super().__post_init__()
    self.sparse_layers(self.num_layers, decoder=True)
    if self.moe is not None and self.moe.batch_prioritised:
      raise errors.ConfigError(
        'batch_prioritised=True is for encoders: tokens would queue before '
        'earlier ones. A decoder-only model has none; set it to False.'
      )


class LanguageModel(nn.Module):
  """Decoder-only model: tokens in, next-token logits out.

  Example:
    >>> config = LMConfig(emb_dim=8, num_heads=2, head_dim=4, num_layers=1,
    ...                   mlp_dim=16)
    >>> tokens = jnp.array([[0, 75, 76]])
    >>> model = LanguageModel(config)
    >>> params = model.init(jax.random.key(0), tokens, tokens)['params']
    >>> model.apply({'params': params}, tokens, tokens).shape
    (1, 3, 259)
  """

  config: LMConfig

  def setup(self):
    self.decoder = transformer.Decoder(self.config, self.config.num_layers)

  def __call__(
    self,
    decoder_input_tokens: typing.Array,
    decoder_target_tokens: typing.Array,
    decoder_segment_ids: typing.Array | None = None,
    decoder_positions: typing.Array | None = None,
    decoder_causal_attention: typing.Array | None = None,
    *,
    enable_dropout: bool = False,
    decode: bool = False,
    max_decode_length: int | None = None,
  ) -> typing.Array:
    """Scores every next token.

    Args:
      decoder_input_tokens: `<int32>[batch, length]`, targets shifted right.
      decoder_target_tokens: `<int32>[batch, length]`, 0 is padding.
      decoder_segment_ids: `<int32>[batch, length]` of packed rows, or None.
      decoder_positions: accepted and ignored: attention is relative.
      decoder_causal_attention: `<int32>[batch, length]`, 1 on a prefix that
        sees itself in both directions (prefix LM), or None.
      enable_dropout: draw dropout from the rng stream `dropout`.
      decode: use the collection `cache`. The first call makes it, as long as
        its tokens; every later one takes the next position.
      max_decode_length: length of that cache, to have it checked; T5X's.

    Returns:
      `<float32>[batch, length, vocab]` logits.

    Raises:
      UserError: a call that does not fit its cache, or `decode` of packed rows
        or of a prefix.
    """
    del decoder_positions
    attention.check_decoding(
      decode,
      decoder_segment_ids=decoder_segment_ids,
      decoder_causal_attention=decoder_causal_attention,
    )
    bias = real = None
    if not decode:
      real = decoder_target_tokens > 0
      visible = attention.causal_mask(decoder_input_tokens.shape[1])
      if decoder_causal_attention is not None:
        prefix = decoder_causal_attention > 0
        visible = visible | attention.pair_mask(prefix, prefix)
      bias = attention.attention_bias(
        attention.pair_mask(real, real),
        visible,
        attention.segment_mask(decoder_segment_ids, decoder_segment_ids),
      )
    return self.decoder(
      decoder_input_tokens,
      None,
      bias,
      None,
      deterministic=not enable_dropout,
      decode=decode,
      max_decode_length=max_decode_length,
      real=None if self.config.moe is None else real,
    )
