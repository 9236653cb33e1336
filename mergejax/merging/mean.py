# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weighted means of models."""

import jax
import jax.numpy as jnp

from mergejax import errors
from mergejax import typing
from mergejax.merging import base


def linear(*, normalize: bool = True) -> base.Merge:
  """Weighted average of models, leaf by leaf.

  `sum_k w_k theta_k / sum_k w_k`, or without the division.

  Args:
    normalize: divide by the sum of the weights. On by default, as in mergekit;
      weights `[2, 1]` and `[2/3, 1/3]` then mean the same.

  Returns:
    A method over any number of models. State: the running sum
    `{path: <float32>[...]}` and the `<float32>[]` sum of weights.

  Raises:
    UserError: the weights sum to zero, so that there is nothing to divide by.

  Example:
    >>> merge([{'w': jnp.zeros(2)}, {'w': jnp.ones(2)}], linear(),
    ...       weights=[1, 3])
    {'w': Array([0.75, 0.75], dtype=float32)}

  Source: Wortsman et al., "Model soups" (2022),
  https://arxiv.org/abs/2203.05482, section 2 (uniform soup); mergekit `linear`.
  """

  def init(specs: typing.SpecTree):
    return {'sum': base.zeros(specs), 'weight': jnp.zeros((), jnp.float32)}

  def update(state, params, *, base=None, weight=1.0, key=None):
    del base, key
    return {
      'sum': jax.tree.map(
        lambda total, leaf: total + jnp.asarray(weight, total.dtype) * leaf,
        state['sum'],
        params,
      ),
      'weight': state['weight'] + jnp.asarray(weight, jnp.float32),
    }

  def finish(state, *, base=None):
    del base
    if not normalize:
      return state['sum']
    weight = state['weight']
    if not isinstance(weight, jax.core.Tracer) and abs(float(weight)) < 1e-8:
      raise errors.UserError(
        'The weights sum to zero, so their average is not defined. Give '
        'weights with another sum, or normalize=False for the plain sum.'
      )
    return jax.tree.map(
      lambda total: total / weight.astype(total.dtype), state['sum']
    )

  return base.Merge(init, update, finish)


def interpolate(*, alpha: float) -> base.Merge:
  """Moves from the base towards a model (PAINT, WiSE-FT).

  `(1 - alpha) base + alpha model`; the convex form, so that `alpha` 0 and 1
  give back the base and the model bit for bit. Several models are averaged
  first.

  Args:
    alpha: how far to go. It has no default: it is what one searches. Values
      outside `[0, 1]` extrapolate.

  Returns:
    A method over a base and at least one model.

  Example:
    >>> merge([{'w': jnp.ones(1)}], interpolate(alpha=0.25),
    ...       base={'w': jnp.zeros(1)})
    {'w': Array([0.25], dtype=float32)}

  Source: Ilharco et al., "Patching open-vocabulary models by interpolating
  weights" (2022), https://arxiv.org/abs/2208.05592, section 2; Wortsman et al.,
  "Robust fine-tuning of zero-shot models" (2021),
  https://arxiv.org/abs/2109.01903.
  """
  average = linear()

  def finish(state, *, base):
    return jax.tree.map(
      lambda origin, model: (1 - alpha) * origin + alpha * model,
      base,
      average.finish(state),
    )

  return average._replace(finish=finish, needs_base=True)
