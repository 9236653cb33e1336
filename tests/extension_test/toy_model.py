# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A model family of a stranger: two experts, a router, an auxiliary loss."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import models


@dataclasses.dataclass(frozen=True)
class ToyConfig:
  """Sizes of a toy mixture of experts."""

  features: int = 4
  classes: int = 3
  hidden: int = 8
  experts: int = 2


class ToyMoE(nn.Module):
  """Softly routed experts; sows its load into `routing`."""

  config: ToyConfig

  @nn.compact
  def __call__(self, x):
    config = self.config
    gates = jax.nn.softmax(nn.Dense(config.experts, name='router')(x))
    self.sow('routing', 'load', jnp.mean(gates, axis=0))
    shape = (config.experts, config.features, config.hidden)
    wi = self.param('wi', nn.initializers.lecun_normal(), shape)
    hidden = nn.relu(jnp.einsum('bf,efh->beh', x, wi))
    mixed = jnp.einsum('beh,be->bh', hidden, gates)
    return nn.Dense(config.classes, name='head')(mixed)


@models.register
class ToyFamily(models.ModelFamily):
  """Batches have `x <float32>[batch, features]` and `labels`."""

  model_type = 'toy_moe'
  config_class = ToyConfig
  module_class = ToyMoE
  axes = (
    (r'router/kernel', ('inputs', 'outputs')),
    (r'router/bias', ('outputs',)),
    (r'wi', ('expert', 'inputs', 'outputs')),
    (r'head/kernel', ('mlp', 'classes')),
    (r'head/bias', ('classes',)),
  )

  def arguments(self, batch, *, train=False):
    return [batch['x']], {}

  def example_batch(self, rows=1, *, length=1):
    return {
      'x': jnp.zeros((rows, self.config.features), jnp.float32),
      'labels': jnp.zeros((rows,), jnp.int32),
    }

  def apply(self, variables, batch, *, mutable=(), **settings):
    outputs = super().apply(
      variables, batch, mutable=(*mutable, 'routing'), **settings
    )
    (load,) = outputs.mutable['routing']['load']
    balance = self.config.experts * jnp.sum(jnp.square(load))
    return outputs._replace(
      losses={'load_balance': 0.01 * balance},
      metrics={'busiest_expert': jnp.max(load)},
    )
