# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Image classifiers: MLP, VGG, ResNet and a small ViT."""

import jax.numpy as jnp

from mergejax.models import base
from mergejax.models import batch_norm
from mergejax.models import registry
from mergejax.names import images
from mergejax.nn import vision

BATCH_STATS = batch_norm.COLLECTION


class ImageFamily(base.ModelFamily):
  """Classifiers of `images <uint8 | float32>[batch, height, width(, channels)]`.

  A batch has `images` and `labels <int32>[batch]`, and `weights
  <float>[batch]` where rows are padding (0) or count in part.
  """

  axes = images.NAMING.axes
  collections = (BATCH_STATS,)
  features = 'head/kernel'

  def arguments(self, batch, *, train=False):
    return [batch['images']], {'train': True} if train else {}

  def example_batch(self, rows=1, *, length=1):
    del length
    return {
      'images': jnp.zeros((rows, *self.config.image_shape), jnp.float32),
      'labels': jnp.zeros((rows,), jnp.int32),
    }

  def rng_streams(self, *, train):
    return ()

  def call(self, variables, batch, *, train=False, rngs=None, mutable=()):
    # Only norms that keep running statistics differ in training.
    train = train and BATCH_STATS in variables
    return super().call(
      variables, batch, train=train, rngs=rngs, mutable=mutable
    )


@registry.register
class MLPFamily(ImageFamily):
  """Multi-layer perceptrons."""

  model_type = 'mlp'
  config_class = vision.MLPConfig
  module_class = vision.MLP


@registry.register
class VGGFamily(ImageFamily):
  """VGG."""

  model_type = 'vgg'
  config_class = vision.VGGConfig
  module_class = vision.VGG


@registry.register
class ResNetFamily(ImageFamily):
  """Residual networks."""

  model_type = 'resnet'
  config_class = vision.ResNetConfig
  module_class = vision.ResNet


@registry.register
class ViTFamily(ImageFamily):
  """Vision transformers."""

  model_type = 'vit'
  config_class = vision.ViTConfig
  module_class = vision.ViT
