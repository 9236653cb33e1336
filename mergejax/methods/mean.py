# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weighted means of models."""

from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing
from mergejax.methods import base as base_lib
from mergejax.methods import entries

# Below this a sum of weights counts as zero, as in mergekit.
TINY_WEIGHT = 1e-8


@entries.register('linear', base='ignored', averages='normalize')
def linear(*, normalize: bool = True) -> base_lib.Merge:
  """Weighted average of models, leaf by leaf.

  `sum_k w_k theta_k / sum_k w_k`, or without the division.

  Args:
    normalize: divide by the sum of the weights. On by default, as in mergekit;
      weights `[2, 1]` and `[2/3, 1/3]` then mean the same.

  Returns:
    A method over any number of models. State of a leaf: the running sum
    <float32>[...] and the sum of weights <float32>[].

  Raises:
    UserError: the weights sum to zero, so that there is nothing to divide by.

  Example:
    >>> merge([{'w': jnp.zeros(2)}, {'w': jnp.ones(2)}], linear(),
    ...       weights=[1, 3])
    {'w': Array([0.75, 0.75], dtype=float32)}

  Source: Wortsman et al., "Model soups" (2022),
  https://arxiv.org/abs/2203.05482, section 2 (uniform soup); mergekit `linear`.
  """

  def init(zeros):
    return {'sum': zeros, 'weight': jnp.zeros((), zeros.dtype)}

  def update(state, leaf, base, weight, context):
    del base, context
    return {
      'sum': state['sum'] + weight * leaf,
      'weight': state['weight'] + weight,
    }

  def finish(state, base):
    del base
    if not normalize:
      return state['sum']
    return state['sum'] / checked_sum(state['weight'])

  return base_lib.leafwise(init, update, finish)


def checked_sum(weight: typing.Array) -> typing.Array:
  """A sum of weights that may be divided by.

  Raises:
    UserError: it is zero. A sum that JAX traces is checked by the caller.
  """
  if not numerics.is_traced(weight):
    if abs(float(weight)) < TINY_WEIGHT:
      raise errors.ConfigError(
        'The weights sum to zero, so their average is not defined. Give '
        'weights with another sum, or normalize=False, where the method has it, '
        'for the plain sum.'
      )
  return weight


def combination(**fields: Any) -> base_lib.Merge:
  """`sum_k c_k theta_k` with coefficients that first passes found.

  Spherical means and model stock are of this form: their first passes need only
  the inner products of the models. With a base it is `base + sum_k c_k (theta_k -
  base)`.

  Args:
    **fields: `first_passes` and other fields of `Merge`; the notes of the last
      pass must hold 'coefficient'.
  """

  def update(state, leaf, base, weight, context):
    del weight
    delta = leaf if base is None else leaf - base
    return state + jnp.asarray(context.note['coefficient'], leaf.dtype) * delta

  def finish(state, base):
    return state if base is None else base + state

  return base_lib.leafwise(lambda zeros: zeros, update, finish, **fields)


@entries.register('interpolate', base='required', averages=True)
def interpolate(*, alpha: float) -> base_lib.Merge:
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
  base_lib.check_finite('alpha', alpha)
  average = linear()

  def finish(state, *, base=None):
    def between(origin, model):
      share = jnp.asarray(alpha, origin.dtype)
      return (1 - share) * origin + share * model

    return jax.tree.map(between, base, average.finish(state))

  return average._replace(finish=finish, base='required')


@entries.register('passthrough', base='ignored', recipe_names={})
def passthrough(*, scale: Any = 1.0) -> base_lib.Merge:
  """Copies one model; the building block of layer stacking.

  `scale * theta`.

  Args:
    scale: a factor, or a list of one; 1 by default, a copy.

  Returns:
    A method over exactly one model.

  Example:
    >>> merge([{'w': jnp.ones(1)}], passthrough(scale=0.5))
    {'w': Array([0.5], dtype=float32)}

  Source: mergekit `passthrough`. The `slices` of a recipe say which layers come
  from which model.
  """
  base_lib.check_finite('scale', scale)
  return base_lib.of_one_model(
    lambda leaf, base, context: (
      base_lib.of_model(scale, context, leaf.dtype) * leaf
    )
  )
