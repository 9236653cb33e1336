# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Image classifiers: MLP, VGG, ResNet and a small ViT.

All take images `<uint8 | float32>[batch, height, width(, channels)]`; bytes are
divided by 255. Logits come out, never probabilities. With `norm='batch'` a
model has running statistics beside its parameters; they live in the same tree
below `batch_stats`, so that whatever averages or permutes parameters sees them
too.
"""

from collections.abc import Callable
import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing

NORMS = ('layer', 'group', 'batch', 'none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """What all image classifiers share.

  Attributes:
    image_shape: height, width and channels.
    classes: number of logits.
    norm: 'layer' (over channels, as the Git Re-Basin models), 'group', 'batch'
      or 'none'.
    groups: groups of 'group'.
  """

  image_shape: tuple[int, int, int] = (28, 28, 1)
  classes: int = 10
  norm: str = 'layer'
  groups: int = 4

  def __post_init__(self):
    if self.norm not in NORMS:
      raise errors.ConfigError(errors.near(self.norm, NORMS, 'norm'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(VisionConfig):
  """A multi-layer perceptron; three layers of 512 as in Git Re-Basin.

  Attributes:
    hidden: width of every hidden layer.
    norm: ignored.
  """

  hidden: tuple[int, ...] = (512, 512, 512)
  norm: str = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGGConfig(VisionConfig):
  """VGG16 unless told otherwise.

  Attributes:
    channels: of every convolution; 0 is a 2 x 2 max pool, left out where the
      image has become a single pixel wide.
    width_multiplier: multiplies all channels.
    dense: widths of the hidden dense layers.
  """

  channels: tuple[int, ...] = (
    64, 64, 0, 128, 128, 0, 256, 256, 256, 0,
    512, 512, 512, 0, 512, 512, 512, 0,
  )  # fmt: skip
  width_multiplier: float = 1.0
  dense: tuple[int, ...] = (512, 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig(VisionConfig):
  """ResNet20 for small images unless told otherwise.

  ResNet50 is `stages=(3, 4, 6, 3), channels=(64, 128, 256, 512),
  bottleneck=True, large_stem=True`.

  Attributes:
    stages: blocks of each stage; every stage but the first halves the image.
    channels: of each stage.
    width_multiplier: multiplies all channels.
    bottleneck: blocks of 1x1, 3x3, 1x1 with four times wider outputs.
    large_stem: a 7x7 convolution of stride 2 and a pool in front.
  """

  stages: tuple[int, ...] = (3, 3, 3)
  channels: tuple[int, ...] = (16, 32, 64)
  width_multiplier: float = 1.0
  bottleneck: bool = False
  large_stem: bool = False

  def __post_init__(self):
    super().__post_init__()
    if len(self.stages) != len(self.channels):
      raise errors.ConfigError(
        f'stages={self.stages} and channels={self.channels} must be of one '
        'length: the blocks of each stage, and the channels of each.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(VisionConfig):
  """A small vision transformer: pre-norm, learned positions, mean pooling.

  Attributes:
    patch: side of a square patch.
    emb_dim: width of the residual stream.
    num_layers: encoder layers.
    num_heads: attention heads.
    mlp_dim: hidden width of the feed-forward block.
  """

  patch: int = 7
  emb_dim: int = 64
  num_layers: int = 4
  num_heads: int = 4
  mlp_dim: int = 128


def _pixels(images: typing.Array) -> typing.Array:
  """`<float32>[batch, height, width, channels]`, bytes scaled to [0, 1]."""
  if jnp.issubdtype(images.dtype, jnp.integer):
    images = images.astype(jnp.float32) / 255.0
  return images if images.ndim == 4 else images[..., None]


def _norm(config: VisionConfig, train: bool, name: str) -> Callable:
  if config.norm == 'layer':
    return nn.LayerNorm(name=name)
  if config.norm == 'group':
    return nn.GroupNorm(num_groups=config.groups, name=name)
  if config.norm == 'batch':
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
  return lambda x: x


def _conv(config, channels, name, *, size=3, stride=1):
  # Without a norm to shift it, a convolution has a bias.
  return nn.Conv(
    channels,
    (size, size),
    strides=(stride, stride),
    use_bias=config.norm == 'none',
    name=name,
  )


class MLP(nn.Module):
  """Dense layers with ReLU between them.

  Example:
    >>> model = MLP(MLPConfig(hidden=(8,)))
    >>> images = jnp.zeros((2, 28, 28, 1))
    >>> params = model.init(jax.random.key(0), images)['params']
    >>> model.apply({'params': params}, images).shape
    (2, 10)
  """

  config: MLPConfig

  @nn.compact
  def __call__(
    self, images: typing.Array, *, train: bool = False
  ) -> typing.Array:
    """`[batch, height, width, channels] -> <float32>[batch, classes]`."""
    del train
    x = _pixels(images)
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(self.config.hidden):
      x = nn.relu(nn.Dense(width, name=f'dense_{i}')(x))
    return nn.Dense(self.config.classes, name='head')(x)


class VGG(nn.Module):
  """VGG (Simonyan and Zisserman, 2015), with a norm after every convolution."""

  config: VGGConfig

  @nn.compact
  def __call__(
    self, images: typing.Array, *, train: bool = False
  ) -> typing.Array:
    """`[batch, height, width, channels] -> <float32>[batch, classes]`."""
    config = self.config
    x = _pixels(images)
    i = 0
    for channels in config.channels:
      if channels:
        width = int(channels * config.width_multiplier)
        x = _conv(config, width, f'conv_{i}')(x)
        x = nn.relu(_norm(config, train, f'norm_{i}')(x))
        i += 1
      elif min(x.shape[1:3]) > 1:
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = x.reshape(x.shape[0], -1)
    for i, width in enumerate(config.dense):
      x = nn.relu(nn.Dense(width, name=f'dense_{i}')(x))
    return nn.Dense(config.classes, name='head')(x)


class _Block(nn.Module):
  """Two 3x3 convolutions, or a bottleneck, around a shortcut."""

  config: ResNetConfig
  channels: int
  stride: int

  @nn.compact
  def __call__(self, x, *, train):
    config, channels = self.config, self.channels
    sizes = (1, 3, 1) if config.bottleneck else (3, 3)
    outputs = channels * (4 if config.bottleneck else 1)
    y = x
    for i, size in enumerate(sizes):
      last = i == len(sizes) - 1
      # The stride sits on the first 3x3 convolution.
      stride = self.stride if i == sizes.index(3) else 1
      width = outputs if last else channels
      y = _conv(config, width, f'conv_{i}', size=size, stride=stride)(y)
      y = _norm(config, train, f'norm_{i}')(y)
      y = y if last else nn.relu(y)
    if self.stride != 1 or x.shape[-1] != outputs:
      x = _conv(config, outputs, 'shortcut', size=1, stride=self.stride)(x)
      x = _norm(config, train, 'shortcut_norm')(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet (He et al., 2016), mean pooling before the head.

  Where the shape changes the shortcut is a 1x1 convolution with a norm: a
  padded identity would tie channels of different stages together.
  """

  config: ResNetConfig

  @nn.compact
  def __call__(
    self, images: typing.Array, *, train: bool = False
  ) -> typing.Array:
    """`[batch, height, width, channels] -> <float32>[batch, classes]`."""
    config = self.config
    widths = [int(c * config.width_multiplier) for c in config.channels]
    stem = dict(size=7, stride=2) if config.large_stem else {}
    x = _conv(config, widths[0], 'stem', **stem)(_pixels(images))
    x = nn.relu(_norm(config, train, 'stem_norm')(x))
    if config.large_stem:
      x = nn.max_pool(x, (3, 3), strides=(2, 2), padding='SAME')
    for s, (blocks, width) in enumerate(zip(config.stages, widths)):
      for b in range(blocks):
        stride = 2 if s and not b else 1
        name = f'stage_{s}_block_{b}'
        x = _Block(config, width, stride, name=name)(x, train=train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(config.classes, name='head')(x)


class _EncoderLayer(nn.Module):
  """Pre-norm self-attention and MLP with residuals."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    y = nn.LayerNorm(name='attention_norm')(x)
    x = x + nn.MultiHeadDotProductAttention(config.num_heads, name='attention')(
      y, y
    )
    y = nn.LayerNorm(name='mlp_norm')(x)
    y = nn.gelu(nn.Dense(config.mlp_dim, name='wi')(y))
    y = partition.constrain(y, ('batch', 'length', 'mlp'))
    x = x + nn.Dense(config.emb_dim, name='wo')(y)
    return partition.constrain(x, ('batch', 'length', 'embed'))


class ViT(nn.Module):
  """A vision transformer (Dosovitskiy et al., 2021)."""

  config: ViTConfig

  @nn.compact
  def __call__(
    self, images: typing.Array, *, train: bool = False
  ) -> typing.Array:
    """`[batch, height, width, channels] -> <float32>[batch, classes]`."""
    del train
    config = self.config
    side = (config.patch, config.patch)
    x = nn.Conv(
      config.emb_dim, side, strides=side, padding='VALID', name='patches'
    )(_pixels(images))
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    positions = self.param(
      'positions', nn.initializers.normal(0.02), (1, *x.shape[1:]), jnp.float32
    )
    x = x + positions
    for i in range(config.num_layers):
      x = _EncoderLayer(config, name=f'layers_{i}')(x)
    x = jnp.mean(nn.LayerNorm(name='norm')(x), axis=1)
    return nn.Dense(config.classes, name='head')(x)
