# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small models of every architecture, whose units can be permuted."""

import functools
import json

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import tree

TEXT = dict(vocab_size=20, emb_dim=10, num_heads=3, head_dim=4, mlp_dim=9)
BUILT = (
  ('mlp', dict(model_type='mlp', hidden=(8, 6), image_shape=(4, 4, 1))),
  ('vgg', dict(model_type='vgg', channels=(6, 0, 8, 0), dense=(7,),
               image_shape=(8, 8, 1))),
  ('resnet_batch', dict(model_type='resnet', stages=(1, 1), channels=(4, 6),
                        norm='batch', image_shape=(8, 8, 1))),
  ('resnet50', dict(model_type='resnet', stages=(1, 2), channels=(4, 8),
                    bottleneck=True, large_stem=True, norm='group',
                    image_shape=(16, 16, 1))),
  ('vit', dict(model_type='vit', emb_dim=12, num_heads=3, num_layers=1,
               mlp_dim=9, patch=4, image_shape=(8, 8, 1))),
  ('t5', dict(model_type='t5x', num_encoder_layers=2, num_decoder_layers=1,
              logits_via_embedding=True, **TEXT)),
  ('lm', dict(model_type='lm', num_layers=2, **TEXT)),
)  # fmt: skip


def shaken(params, seed, size=0.3):
  """Parameters with noise, so that no two units are alike."""
  rng = np.random.default_rng(seed)

  def shake(path, leaf):
    noise = size * rng.normal(size=leaf.shape).astype(np.float32)
    return np.abs(leaf + noise) if path.endswith('var') else leaf + noise

  return tree.map_paths(shake, jax.tree.map(np.asarray, params))


def random_batch(module, rows=3, length=5, seed=0):
  rng = np.random.default_rng(seed)
  batch = models.family_of(module).example_batch(rows, length=length)
  batch.pop('labels', None)
  return {
    name: rng.random(x.shape).astype(np.float32)
    if name == 'images'
    else rng.integers(1, 20, x.shape)
    for name, x in batch.items()
  }


@functools.cache
def initial_params(fields, seed):
  module = models.build(json.loads(fields))
  return models.family_of(module).init(jax.random.key(seed))


def built(fields, seed=0):
  """`(module, apply, params, batch)`."""
  module = models.build(fields)
  params = shaken(initial_params(json.dumps(fields), seed), seed)
  apply = lambda params, batch: models.family_of(module).logits(params, batch)
  return module, apply, params, random_batch(module)


class Stacked(nn.Module):
  """Scanned gated MLP blocks around a residual stream."""

  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        gate = nn.Dense(7, name='wi_0')(x) * nn.tanh(
          nn.Dense(7, name='wi_1')(x)
        )
        return x + nn.Dense(6, name='wo')(gate), None

    x = nn.Dense(6, name='in')(x)
    layers = nn.scan(
      Block, variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True}, length=3,
    )  # fmt: skip
    return nn.Dense(2, name='out')(layers(name='layers')(x, None)[0])


def stacked_model():
  module = Stacked()
  x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  params = shaken(module.init(jax.random.key(0), x)['params'], 0)
  apply = lambda params, x: module.apply({'params': params}, x)
  return module, apply, params, x
