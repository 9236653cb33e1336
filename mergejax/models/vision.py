# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Image classifiers: MLP, VGG, ResNet and a small ViT."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.models import base
from mergejax.models import registry
from mergejax.nn import vision

BATCH_STATS = 'batch_stats'


class ImageFamily(base.ModelFamily):
  """Classifiers of `images <uint8 | float32>[batch, height, width(, channels)]`.

  A batch has `images` and `labels <int32>[batch]`, and `weights
  <float>[batch]` where rows are padding (0) or count in part.
  """

  axes = (
    (r'batch_stats/.*', ('embed',)),
    (r'(.*/)?(\w*norm\w*)/(scale|bias)', ('embed',)),
    (r'(.*/)?(query|key|value)/kernel', ('embed', 'heads', 'kv')),
    (r'(.*/)?(query|key|value)/bias', ('heads', 'kv')),
    (r'(.*/)?attention/out/kernel', ('heads', 'kv', 'embed')),
    (r'(.*/)?(attention/out|wo|patches)/bias', ('embed',)),
    (r'(.*/)?wo/kernel', ('mlp', 'embed')),
    (r'(.*/)?(wi|dense_\d+)/kernel', ('embed', 'mlp')),
    (r'(.*/)?patches/kernel', ('height', 'width', 'channels', 'embed')),
    (r'(.*/)?(conv_\d+|stem|shortcut)/kernel', ('height', 'width', 'embed', 'mlp')),
    (r'(.*/)?(wi|dense_\d+|conv_\d+|stem|shortcut)/bias', ('mlp',)),
    (r'head/kernel', ('embed', 'classes')),
    (r'head/bias', ('classes',)),
    (r'positions', ('one', 'length', 'embed')),
  )  # fmt: skip
  collections = (BATCH_STATS,)

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
    """As every family; rows of weight 0 have no part in batch norms.

    A batch of nothing else leaves the running statistics as they were.

    Raises:
      StructureError: a batch norm whose first axis is not that of the batch,
        where some rows have no weight.
    """
    running = train and BATCH_STATS in variables
    real = None
    if running and 'weights' in batch:
      real = jnp.asarray(batch['weights']) > 0
    with nn.intercept_methods(_norms_of(real)):
      logits, changed = super().call(
        variables, batch, train=running, rngs=rngs, mutable=mutable
      )
    if real is not None:
      keep = lambda new, old: jnp.where(jnp.any(real), new, old)
      stats = jax.tree.map(keep, changed[BATCH_STATS], variables[BATCH_STATS])
      changed = {**changed, BATCH_STATS: stats}
    return logits, changed

  def features_layer(self, specs):
    return 'head/kernel'


def _norms_of(real: jax.Array | None) -> Callable[..., Any]:
  """An interceptor that shows batch norms the real rows, `<bool>[batch]`."""

  def interceptor(call, positional, named, context):
    if (
      real is None
      or not isinstance(context.module, nn.BatchNorm)
      or context.method_name != '__call__'
      or named.get('mask') is not None
    ):
      return call(*positional, **named)
    inputs = positional[0] if positional else named['x']
    if len(inputs) != len(real):
      raise errors.StructureError(
        f'The batch norm {"/".join(context.module.path)} sees {len(inputs)} '
        f'rows, the batch has {len(real)}, some of no weight: which of them it '
        'must leave out is not known. Give it its `mask`, or whole batches '
        'without weights.'
      )
    # The mean of no row is NaN: where none is real, all are taken.
    mask = (real | ~jnp.any(real)).reshape(-1, *(1,) * (inputs.ndim - 1))
    return call(*positional, **named, mask=mask)

  return interceptor


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
