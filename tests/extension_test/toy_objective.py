# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""An objective of a stranger: cross entropy that looks at hard targets more.

`sum_i w_i (1 - p_i)^g (-log p_i) / sum_i w_i`, Lin et al. (2017),
https://arxiv.org/abs/1708.02002.
"""

import functools

import jax
import jax.numpy as jnp

from mergejax.training import losses


def _loss(family, params, batch, rngs, *, gamma):
  outputs = family.apply(family.variables(params), batch, train=True, rngs=rngs)
  log_p = jax.nn.log_softmax(outputs.logits.astype(jnp.float32))
  picked = jnp.take_along_axis(log_p, outputs.targets[..., None], axis=-1)[
    ..., 0
  ]
  hard = (1.0 - jnp.exp(picked)) ** gamma
  value = losses.weighted_mean(-hard * picked, outputs.weights)
  metrics = {'loss': value, 'tokens': jnp.sum(outputs.weights)}
  for name, extra in outputs.losses.items():
    value, metrics[name] = value + extra, extra
  return value, outputs._replace(metrics={**metrics, **outputs.metrics})


def focal(gamma: float = 2.0):
  """The objective with its exponent."""
  return functools.partial(_loss, gamma=gamma)
