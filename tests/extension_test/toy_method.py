# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A merge method of a stranger, with a first pass: equal norms before a mean.

`w = sum_k a_k (max_j |w_j| / |w_k|)^p w_k / sum_k a_k`, norms over a whole leaf;
what is zero stays as it is.
"""

import jax.numpy as jnp

from mergejax import methods


def even_norms(power: float = 1.0) -> methods.Merge:
  """Averages models after scaling each leaf to its largest norm.

  Args:
    power: p; 0 is the plain average, 1 scales to equal norms.
  """

  def measure(leaves, base, contexts, weights):
    return [jnp.sum(jnp.square(leaf)) for leaf in leaves]

  def conclude(found, contexts, weights):
    largest = jnp.max(jnp.stack(found))
    scale = lambda square: jnp.where(square > 0, largest / square, 1.0)
    return [{'scale': scale(square) ** (0.5 * power)} for square in found]

  def update(state, leaf, base, weight, context):
    scale = jnp.asarray(context.note['scale'], leaf.dtype)
    return state[0] + weight * scale * leaf, state[1] + weight

  return methods.leafwise(
    lambda zeros: (zeros, jnp.zeros((), zeros.dtype)),
    update,
    lambda state, base: state[0] / state[1],
    first_passes=(methods.FirstPass(measure, conclude),),
  )
