# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The side network of a ladder: a narrow stack that reads another's layers.

Its blocks are the backbone's own layers at smaller sizes, and their parameters
have the backbone's names.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import typing
from mergejax.nn import attention
from mergejax.nn import layers
from mergejax.nn import transformer

_STREAM = ('batch', 'length', 'embed')


def narrow(
  config: transformer.StackConfig, reduction: int
) -> transformer.StackConfig:
  """The sizes of the side network: width, heads and hidden layers over r."""
  return dataclasses.replace(
    config,
    emb_dim=config.emb_dim // reduction,
    head_dim=config.head_dim // reduction,
    mlp_dim=config.mlp_dim // reduction,
    relative_per_layer=False,
    remat_policy='none',
  )


class SideStack(nn.Module):
  """One stack of the side network, from ladders to its final norm.

  `s = D_first(dropout(h_emb))`; for every kept layer i
  `s = Block_i(mu_i s + (1 - mu_i) D_i(h_i))`; then `dropout(norm(s))`.

  Attributes:
    name: 'encoder' or 'decoder', as in names of parameters.
    config: sizes, from `narrow`.
    kept: which layers of the backbone are read, ascending.
    temperature: of the gates, `mu = sigmoid(alpha / temperature)`; None adds
      `s + D_i(h_i)`.
    residual: 'before' the block, as above, or 'after':
      `s = mu_i Block_i(s) + (1 - mu_i) D_i(h_i)`.
    deterministic: no dropout.
    decode: see `attention.Attention`.
    dropped: the embedded tokens come with dropout applied.
  """

  config: transformer.StackConfig
  kept: tuple[int, ...]
  temperature: float | None
  residual: str
  deterministic: bool
  decode: bool = False
  dropped: bool = False

  @nn.compact
  def __call__(
    self,
    ladders: list[typing.Array],
    encoded: typing.Array | None,
    bias: typing.Array | None,
    cross_bias: typing.Array | None,
  ) -> typing.Array:
    """Runs the stack.

    Args:
      ladders: `<dtype>[batch, length, embed]` each: the backbone's embedded
        tokens, then the outputs of the kept layers.
      encoded: `<dtype>[batch, inputs, embed / r]` of the side encoder, or None.
      bias: the mask of self-attention, as the backbone's stack is given it.
      cross_bias: likewise of cross-attention.

    Returns:
      `<dtype>[batch, length, embed / r]`.
    """
    ladders = [partition.constrain(h, _STREAM) for h in ladders]
    layer, bias = self._layers(ladders[0].shape[1], bias)
    shared = (bias,) if self._encodes else (encoded, bias, cross_bias)
    embedded = ladders[0]
    if not self.dropped:
      embedded = self._dropout(embedded)
    state = self._down('first', embedded).astype(self.config.dtype)
    for i, h in zip(self.kept, ladders[1:], strict=True):
      h = self._down(f'down_{i}', h)
      if self.residual == 'before':
        state = self._mixed(i, state, h)
      state = layer(name=f'layers_{i}')(state, *shared)
      if self.residual == 'after':
        state = self._mixed(i, state, h)
    norm = layers.RMSNorm(self.config.dtype, name=f'{self.name}_norm')
    return self._dropout(norm(state))

  @property
  def _encodes(self):
    return self.name == 'encoder'

  def _layers(self, length, bias):
    """`(a maker of layers, the bias of their self-attention)`."""
    config, at = self.config, None
    if self.decode:
      cache = self.variables.get('cache', {})
      cached, at = transformer.cached_length(cache), transformer.position(cache)
      length = cached or length
      if cached is None:
        bias = attention.attention_bias(attention.causal_mask(length))
    relative = attention.RelativePositionBias(
      num_heads=config.num_heads,
      num_buckets=config.relative_buckets,
      max_distance=config.relative_max_distance,
      bidirectional=self._encodes,
      name='relpos_bias',
    )(length, length, at=at)
    bias = relative if bias is None else relative + bias

    def layer(name):
      if self._encodes:
        return transformer.EncoderLayer(config, self.deterministic, name=name)
      return transformer.DecoderLayer(
        config, length, self.deterministic, self.decode, name=name
      )

    return layer, bias

  def _down(self, name, h):
    """`<float32>[batch, length, embed / r]`: states grow with depth."""
    dense = nn.Dense(
      self.config.emb_dim, dtype=jnp.float32,
      dot_general=layers.flat_dot_general, name=name,
    )  # fmt: skip
    return dense(h.astype(jnp.float32))

  def _mixed(self, i, state, h):
    """The gate between the side state and a ladder, in float32."""
    wide = state.astype(jnp.float32)
    if self.temperature is None:
      return (wide + h).astype(state.dtype)
    alpha = self.param(f'gate_{i}', nn.initializers.zeros, (), jnp.float32)
    mu = jax.nn.sigmoid(alpha / self.temperature)
    return (mu * wide + (1 - mu) * h).astype(state.dtype)

  def _dropout(self, x):
    return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(
      x, deterministic=self.deterministic
    )
