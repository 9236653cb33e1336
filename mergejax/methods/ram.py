# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""RAM: merging sparse task vectors of reinforcement learning."""

import jax.numpy as jnp

from mergejax.methods import base as base_lib
from mergejax.methods import entries


def _active(delta, epsilon):
  return jnp.abs(delta) > jnp.asarray(epsilon, delta.dtype)


def _method(epsilon, factor, first_passes=()):
  """Adds what one model changed, averages what several changed."""
  base_lib.check_not_negative('epsilon', epsilon)

  def init(zeros):
    return {'alone': zeros, 'sum': zeros, 'count': zeros}

  def update(state, leaf, base, weight, context):
    del weight
    delta = leaf - base
    zero = jnp.zeros_like(delta)
    active = _active(delta, epsilon)
    kept = jnp.where(active, delta, zero)
    return {
      'alone': state['alone'] + factor(context, delta.dtype) * kept,
      'sum': state['sum'] + kept,
      'count': state['count'] + active.astype(delta.dtype),
    }

  def finish(state, base):
    shared = state['sum'] / jnp.maximum(state['count'], 1.0)
    return base + jnp.where(state['count'] == 1, state['alone'], shared)

  # First passes count elements.
  return base_lib.leafwise(
    init,
    update,
    finish,
    first_passes=first_passes,
    base='required',
    numbered=bool(first_passes),
  )


@entries.register('ram', base='required')
def ram(*, epsilon: float = 1e-5) -> base_lib.Merge:
  """Adds changes that one model made, averages those that several made.

  At each entry, over the models with `|theta_k - base| > epsilon`: their
  change if there is one, the mean of their changes if there are several.

  Args:
    epsilon: smaller changes count as none; 1e-5 as in mergekit.

  Returns:
    A method over a base and any number of models; weights play no part.

  Example:
    >>> merge([{'w': jnp.array([1.0, 1.0])}, {'w': jnp.array([0.0, 3.0])}],
    ...       ram(), base={'w': jnp.zeros(2)})
    {'w': Array([1., 2.], dtype=float32)}

  Source: "Reinforced Agent Merging" (2026), https://arxiv.org/abs/2601.13572.
  """
  return _method(epsilon, lambda context, dtype: jnp.ones((), dtype))


@entries.register('ram_plus', base='required')
def ram_plus(
  *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> base_lib.Merge:
  """RAM with changes of one model alone made larger.

  As `ram`, but what model k alone changed is multiplied by
  `1 + r clip(shared_k / unique_k, 0, alpha)`, counting its entries of a leaf
  that other models changed too, and those that it alone changed.

  Args:
    r: strength; 0.1 as in mergekit.
    alpha: largest ratio that counts; 0.2 as in mergekit.
    epsilon: see `ram`.

  Returns:
    A method over a base and any number of models; weights play no part.

  Example:
    >>> merge([{'w': jnp.array([1.0, 1.0])}, {'w': jnp.array([0.0, 3.0])}],
    ...       ram_plus(), base={'w': jnp.zeros(2)})
    {'w': Array([1.02, 2.  ], dtype=float32)}

  Source: "Reinforced Agent Merging" (2026), https://arxiv.org/abs/2601.13572,
  which counts over the whole model; mergekit `ramplus_tl` and this, over each
  leaf.
  """
  for name, value in (('r', r), ('alpha', alpha)):
    base_lib.check_not_negative(name, value)

  def measure(leaves, base, contexts, weights):
    del contexts, weights
    active = [_active(leaf - base, epsilon) for leaf in leaves]
    count = sum(a.astype(jnp.uint32) for a in active)
    number = lambda mask: jnp.sum(mask, dtype=jnp.uint32)
    return [(number(a & (count > 1)), number(a & (count == 1))) for a in active]

  def conclude(found, contexts, weights):
    del contexts, weights
    notes = []
    for shared, unique in found:
      shared, unique = (
        jnp.asarray(n).astype(jnp.float32) for n in (shared, unique)
      )
      ratio = shared / jnp.maximum(unique, 1.0)
      notes.append({'factor': 1 + jnp.float32(r) * jnp.clip(ratio, 0, alpha)})
    return notes

  return _method(
    epsilon,
    lambda context, dtype: jnp.asarray(context.note['factor'], dtype),
    (base_lib.FirstPass(measure, conclude),),
  )
