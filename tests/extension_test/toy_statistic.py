# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A statistic of a stranger, of its own shape, and a method that needs it.

`s = mean over examples of |x|` for each input of a kernel; kernels are averaged
row by row with these weights, `w_i = sum_k s_ki w_ki / sum_k s_ki`.
"""

import jax.numpy as jnp

from mergejax import methods
from mergejax import models
from mergejax import statistics

INPUT_SIZE = statistics.StatisticSpec(
  'input_size', layout='inputs', required='some', values='nonnegative'
)


def input_size() -> statistics.Statistic:
  """The mean size of every input of the router of a toy model."""

  def measure(module, params, batch, number, shards):
    family = models.family_of(module)
    x, weights = jnp.abs(batch['x']), family.target_weights(batch)
    rows = x.reshape(shards, -1, x.shape[-1])
    weights = weights.reshape(shards, -1)
    summed = jnp.einsum('sri,sr->si', rows, weights)
    found = {'sum': summed, 'count': jnp.sum(weights, axis=1)}
    return {'router/kernel': found}

  return statistics.Statistic(INPUT_SIZE, measure)


def by_input_size() -> methods.Merge:
  """Averages the rows of kernels by the size of their inputs."""

  def update(state, leaf, base, weight, context):
    size = weight
    if context.stats:
      stat = jnp.asarray(context.stats['input_size'], leaf.dtype)
      size = weight * stat.reshape(-1, *(1,) * (leaf.ndim - 1))
    return state[0] + size * leaf, state[1] + size * jnp.ones_like(leaf)

  return methods.leafwise(
    lambda zeros: (zeros, zeros),
    update,
    lambda state, base: state[0] / state[1],
    needs=(INPUT_SIZE,),
    view='input',
  )
