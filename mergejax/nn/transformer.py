# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder stacks, of which T5 and decoder-only models are made.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.nn import attention
from mergejax.nn import attention_kernels
from mergejax.nn import layers
from mergejax.nn import moe as moe_lib
from mergejax.nn import moe_config
from mergejax.nn import stack as stack_lib


def _told(default, describe):
  """A field that `models.describe` tells if it is changed, or never."""
  return dataclasses.field(default=default, metadata={'describe': describe})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
  """Sizes that all models of the family share; names are T5X's.

  Attributes:
    vocab_size: rows of the embedding.
    emb_dim: width of the residual stream.
    num_heads: attention heads.
    head_dim: size of one head.
    mlp_dim: hidden size of the feed-forward block.
    mlp_activations: `('relu',)` for 1.0, `('gelu', 'linear')` for 1.1.
    dropout_rate: dropout everywhere; 0 because a model is built to be
      evaluated and merged; training configurations set 0.1.
    logits_via_embedding: True for 1.0 (tied head, scaled by 1/sqrt(embed)).
    dtype: compute dtype; parameters are float32, logits always float32.
    float32_attention_logits: see `attention.Attention`.
    relative_buckets: see `attention.relative_position_bucket`.
    relative_max_distance: likewise.
    relative_per_layer: every layer has a table of relative positions of its
      own, as in T5X's `scalable_t5`; by default one serves a stack.
    scan_layers: layers are stacked in one, see `stack`.
    param_scan_axis: where scanned parameters have the axis of layers; 1 as in
      T5X, or 0.
    remat_policy: what the backward pass computes anew, see `stack.apply`.
    attention_kernel: 'reference', 'xla', 'cudnn' or 'flash', see
      `attention_kernels`; weights do not know of it.
    init_scale: variance of fresh kernels times their inputs; 0.1 in Switch,
      which a large sparse model needs to begin stably.
    moe: which layers have experts, and how they are routed; None: none. Where
      it is read from JSON, a mapping of the fields of `moe_config.MoeConfig`.

  Raises:
    ConfigError: an axis of layers that a parameter does not have, an unknown
      kernel, or sparse layers that cannot be, see `moe_config`.
  """

  vocab_size: int
  emb_dim: int = 512
  num_heads: int = 6
  head_dim: int = 64
  mlp_dim: int = 1024
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  dropout_rate: float = 0.0
  logits_via_embedding: bool = False
  dtype: str = 'float32'
  float32_attention_logits: bool = False
  relative_buckets: int = 32
  relative_max_distance: int = 128
  relative_per_layer: bool = _told(False, 'changed')
  scan_layers: bool = _told(False, 'changed')
  param_scan_axis: int = _told(1, 'changed')
  remat_policy: str = _told('none', 'never')
  attention_kernel: str = _told(attention_kernels.REFERENCE, 'never')
  init_scale: float = _told(1.0, 'changed')
  moe: moe_config.MoeConfig | None = _told(None, 'changed')

  def __post_init__(self):
    attention_kernels.check(self.attention_kernel)
    if self.param_scan_axis not in (0, 1):
      raise errors.ConfigError(
        f'param_scan_axis must be 0 or 1, not {self.param_scan_axis!r}: the '
        'scale of a norm has one axis beside that of the layers.'
      )
    if not isinstance(self.moe, moe_config.MoeConfig | None):
      object.__setattr__(self, 'moe', moe_config.from_fields(self.moe))

  def sparse_layers(self, layers: int, *, decoder: bool) -> tuple[bool, ...]:
    """Which layers of a stack have experts.

    Raises:
      ConfigError: see `moe_config`; scanned layers of which only some have.
    """
    if self.moe is None:
      return (False,) * layers
    if decoder:
      self.moe.check_causal()
    sparse = self.moe.sparse_layers(layers, decoder=decoder)
    if self.scan_layers and len(set(sparse)) > 1:
      raise errors.ConfigError(
        f'{sum(sparse)} of {layers} layers are sparse, and scan_layers=True '
        'makes all layers from one: set it to False, or make all of them sparse '
        'or none.'
      )
    return sparse


# The residual stream, where layers meet.
_STREAM = ('batch', 'length', 'embed')


class DecoderLayer(nn.Module):
  """Causal self-attention, cross-attention if there is an encoder, MLP.

  Shared by T5's decoder and the decoder-only language model.

  Attributes:
    config: sizes.
    length: positions of a row; while decoding, of the cache.
    deterministic: no dropout.
    decode: see `attention.Attention`.
    sparse: experts instead of the MLP.
  """

  config: StackConfig
  length: int
  deterministic: bool
  decode: bool = False
  sparse: bool = False

  @nn.compact
  def __call__(self, x, encoded, bias, cross_bias, real=None):
    block = _Block(self.config, self.deterministic, self.sparse)
    if self.config.relative_per_layer:
      at = position(self.variables.get('cache', {})) if self.decode else None
      bias = block.bias(self.length, bias, bidirectional=False, at=at)
    y = block.norm('pre_self_attention_layer_norm')(x)
    y = block.attention('self_attention')(
      y, y, bias, deterministic=self.deterministic, decode=self.decode
    )
    x = x + block.dropout(y)
    if encoded is not None:
      y = block.norm('pre_cross_attention_layer_norm')(x)
      y = block.attention('encoder_decoder_attention')(
        y, encoded, cross_bias, deterministic=self.deterministic,
        keep=self.decode,
      )  # fmt: skip
      x = x + block.dropout(y)
    x = block.feed_forward(x, real, decoder=True, decode=self.decode)
    return partition.constrain(x, _STREAM)


class EncoderLayer(nn.Module):
  """Bidirectional self-attention and MLP, each pre-normed, with residuals."""

  config: StackConfig
  deterministic: bool
  sparse: bool = False

  @nn.compact
  def __call__(self, x, bias, real=None):
    block = _Block(self.config, self.deterministic, self.sparse)
    if self.config.relative_per_layer:
      bias = block.bias(x.shape[1], bias, bidirectional=True)
    y = block.norm('pre_attention_layer_norm')(x)
    y = block.attention('attention')(
      y, y, bias, deterministic=self.deterministic
    )
    x = x + block.dropout(y)
    return partition.constrain(block.feed_forward(x, real), _STREAM)


@dataclasses.dataclass(frozen=True)
class _Block:
  """Builds the parts of one layer inside that layer's own name scope."""

  config: StackConfig
  deterministic: bool
  sparse: bool = False

  def norm(self, name):
    return layers.RMSNorm(self.config.dtype, name=name)

  def attention(self, name):
    config = self.config
    return attention.Attention(
      num_heads=config.num_heads,
      head_dim=config.head_dim,
      dtype=config.dtype,
      dropout_rate=config.dropout_rate,
      float32_logits=config.float32_attention_logits,
      kernel=config.attention_kernel,
      init_scale=config.init_scale,
      name=name,
    )

  def dropout(self, x):
    """Residual dropout: one mask along length, as T5X draws it."""
    return nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))(
      x, deterministic=self.deterministic
    )

  def feed_forward(self, x, real, *, decoder=False, decode=False):
    """The residual stream with what the MLP, or the experts, make of it."""
    if not self.sparse:
      return x + self._mlp(x, 'mlp')
    y = self.norm('pre_mlp_layer_norm')(x)
    y = moe_lib.MoeLayer(self.config.moe, *self._sizes(), decoder, name='mlp')(
      y, real, deterministic=self.deterministic, decode=decode
    )
    x = x + self.dropout(y)
    return x + self._mlp(x, 'extra_mlp') if self.config.moe.extra_mlp else x

  def _mlp(self, x, name):
    y = self.norm(f'pre_{name}_layer_norm')(x)
    y = layers.Mlp(*self._sizes(), name=name)(
      y, deterministic=self.deterministic
    )
    return self.dropout(y)

  def _sizes(self):
    """Of one block, an expert or none."""
    config = self.config
    return (
      config.mlp_dim, config.mlp_activations, config.dtype, config.dropout_rate,
      config.init_scale,
    )  # fmt: skip

  def bias(self, length, mask_bias, *, bidirectional, at=None):
    """Relative positions (of one query, `at`), with the mask if there is one."""
    config = self.config
    bias = attention.RelativePositionBias(
      num_heads=config.num_heads,
      num_buckets=config.relative_buckets,
      max_distance=config.relative_max_distance,
      bidirectional=bidirectional,
      name='relpos_bias',
    )(length, length, at=at)
    return bias if mask_bias is None else bias + mask_bias

  def stack(self, layer, count, name, x, *args):
    """`x` through a stack of layers; what they share is in `args`."""
    config = self.config
    sparse = config.sparse_layers(count, decoder=name == 'decoder')
    return stack_lib.apply(
      layer, count, name, x, *args, each=[{'sparse': each} for each in sparse],
      scan_axis=config.param_scan_axis if config.scan_layers else None,
      remat=config.remat_policy,
    )  # fmt: skip


class TokenEmbedder(nn.Embed):
  """An embedding that can be the output head too, in float32."""

  def attend(self, query: typing.Array) -> typing.Array:
    """`<float>[..., embed] -> <float32>[..., vocab]`, over sqrt(embed)."""
    table = self.embedding.astype(jnp.float32)
    return query.astype(jnp.float32) @ table.T / np.sqrt(self.features)


def token_embedder(config: StackConfig) -> TokenEmbedder:
  """The table `token_embedder/embedding [vocab, embed]`, drawn from N(0, 1)."""
  return TokenEmbedder(
    config.vocab_size,
    config.emb_dim,
    dtype=config.dtype,
    embedding_init=nn.initializers.normal(1.0),
    name='token_embedder',
  )


class Encoder(nn.Module):
  """The encoder stack, from embedded tokens to the final norm."""

  config: StackConfig
  num_layers: int

  @nn.compact
  def __call__(self, embedded, mask_bias, *, deterministic, real=None):
    config = self.config
    block = _Block(config, deterministic)
    bias = mask_bias
    if not config.relative_per_layer:
      bias = block.bias(embedded.shape[1], mask_bias, bidirectional=True)
    x = partition.constrain(block.dropout(embedded), _STREAM)
    layer = functools.partial(EncoderLayer, config, deterministic)
    x = block.stack(layer, self.num_layers, 'encoder', x, bias, real)
    x = block.norm('encoder_norm')(x)
    # Element-wise here, unlike every other residual dropout of T5X.
    return nn.Dropout(config.dropout_rate)(x, deterministic=deterministic)


class Decoder(nn.Module):
  """The decoder stack, from embedded tokens to logits.

  Attributes:
    config: sizes.
    num_layers: layers of this stack.
    embedder: the embedding shared with the encoder, also the head when
      `logits_via_embedding`; None makes the decoder own one (a decoder-only
      model), and then it is given tokens rather than embeddings.
  """

  config: StackConfig
  num_layers: int
  embedder: nn.Embed | None = None

  @nn.compact
  def __call__(
    self,
    tokens,
    encoded,
    mask_bias,
    cross_bias,
    *,
    deterministic,
    decode,
    max_decode_length=None,
    real=None,
  ):
    config = self.config
    block = _Block(config, deterministic)
    embedder = self.embedder or token_embedder(config)
    length, at = tokens.shape[1], None
    if decode:
      cache = self.variables.get('cache', {})
      cached, at = cached_length(cache), position(cache)
      length = _check_length(cached or length, max_decode_length)
      if cached is None:
        mask_bias = attention.attention_bias(attention.causal_mask(length))
    bias = mask_bias
    if not config.relative_per_layer:
      bias = block.bias(length, mask_bias, bidirectional=False, at=at)
    x = partition.constrain(block.dropout(embedder(tokens)), _STREAM)
    layer = functools.partial(
      DecoderLayer, config, length, deterministic, decode
    )
    shared = encoded, bias, cross_bias, real
    x = block.stack(layer, self.num_layers, 'decoder', x, *shared)
    x = block.dropout(block.norm('decoder_norm')(x))
    if config.logits_via_embedding:
      return embedder.attend(x)
    return layers.dense(
      config.vocab_size, 'float32', layers.mlp_init(), 'logits_dense'
    )(x)


def cached_length(cache: typing.Tree) -> int | None:
  """Positions that a decoder's `cache` has; None before it is made."""
  for path, leaf in tree.flatten(cache).items():
    if path.endswith('cached_key'):
      return leaf.shape[-1]
  return None


def position(cache: typing.Tree) -> typing.Array | None:
  """The next position of a decoder's `cache`; None before it is made."""
  for path, leaf in tree.flatten(cache).items():
    if path.endswith('cache_index'):
      return leaf.reshape(-1)[0]  # scanned layers have one each
  return None


def _check_length(length: int, max_decode_length: int | None) -> int:
  """The length of the cache, which `max_decode_length` must agree with."""
  if max_decode_length not in (None, length):
    raise errors.ConfigError(
      f'The call that makes the cache fixes its length; this is a cache of '
      f'{length} positions, but max_decode_length is {max_decode_length}. Make '
      'the cache with tokens of that length, or leave max_decode_length out.'
    )
  return length
