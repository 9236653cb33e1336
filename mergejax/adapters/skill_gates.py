# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How much of every skill of an inventory a task takes."""

import math

import jax
import jax.numpy as jnp

SELECTORS = ('sigmoid', 'straight_through', 'l2', 'average', 'uniform')
_EPSILON = 1e-12


def gates(
  logits: jax.Array,
  selector: str = 'sigmoid',
  *,
  shared_skill: bool = False,
  key: jax.Array | None = None,
) -> jax.Array:
  """How much of every skill, `w = g(Z) / (sum_s g(Z) + 1e-12)`.

  Args:
    logits: `<float32>[..., heads, skills]`, Z.
    selector: 'sigmoid', `g = sigmoid`; 'straight_through', it is rounded, and
      its gradient is the sigmoid's; 'l2', `w = Z / |Z|` by head, which may be
      negative; 'average', `sigmoid(Z) sqrt(heads / skills)`, not normalised;
      'uniform', 1 / skills.
    shared_skill: the last skill's gate is 1, before they are normalised.
    key: of 'sigmoid': relaxed Bernoulli of temperature 1, `sigmoid(Z + log u -
      log(1 - u))` with u uniform; None draws nothing.

  Returns:
    `<float32>` of the same shape.
  """
  heads, skills = logits.shape[-2:]
  if selector == 'uniform':
    return jnp.full(logits.shape, 1 / skills, jnp.float32)
  if selector == 'l2':
    size = jnp.sqrt(jnp.sum(jnp.square(logits), axis=-1, keepdims=True))
    return logits / jnp.maximum(size, _EPSILON)
  if key is not None:
    small = jnp.finfo(jnp.float32).tiny
    u = jax.random.uniform(key, logits.shape, minval=small)
    logits = logits + jnp.log(u) - jnp.log1p(-u)
  found = jax.nn.sigmoid(logits)
  if selector == 'straight_through':
    found = found + jax.lax.stop_gradient(jnp.round(found) - found)
  if shared_skill:
    found = found.at[..., -1].set(1.0)
  if selector == 'average':
    return found * math.sqrt(heads / skills)
  return found / (jnp.sum(found, axis=-1, keepdims=True) + _EPSILON)
