# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A step transform of a stranger: parameters stay within reach of the first.

`theta <- theta_0 + r (theta - theta_0) / max(r, |theta - theta_0|)`.
"""

import jax
import jax.numpy as jnp
import optax

from mergejax import training


def leash(radius: float) -> training.StepTransform:
  """Pulls parameters back to a ball around where they began."""

  def update(start, old, new, metrics):
    moved = jax.tree.map(jnp.subtract, new.params, start)
    distance = optax.tree.norm(moved)
    share = radius / jnp.maximum(radius, distance)
    params = jax.tree.map(
      lambda first, step: first + share.astype(step.dtype) * step, start, moved
    )
    return start, new.replace(params=params), {**metrics, 'distance': distance}

  return training.StepTransform('leash', lambda params: params, update)
