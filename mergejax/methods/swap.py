# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Two models, entry by entry: nearswap and Arcee fusion."""

import math

import jax
import jax.numpy as jnp

from mergejax.methods import base as base_lib
from mergejax.methods import entries


@entries.register('nearswap', base='required')
def nearswap(*, t: float) -> base_lib.Merge:
  """Moves each entry of the base towards the model by at most `t`.

  `(1 - s) base + s model`, `s = clip(t / max(|base - model|, 1e-6), 0, 1)`.

  Args:
    t: the largest step, in units of the weights; typically 1e-4.

  Returns:
    A method over a base and exactly one model.

  Raises:
    UserError: `t` is not positive.

  Example:
    >>> merge([{'w': jnp.array([1.0, 0.01])}], nearswap(t=0.1),
    ...       base={'w': jnp.zeros(2)})
    {'w': Array([0.1 , 0.01], dtype=float32)}

  Source: mergekit `nearswap`, after alchemonaut's QuartetAnemoi.
  """
  base_lib.check_option('t', t, lambda value: value > 0, 'above 0')

  def combine(leaf, base, context):
    del context
    gap = jnp.maximum(jnp.abs(base - leaf), jnp.asarray(1e-6, leaf.dtype))
    share = jnp.clip(jnp.asarray(t, leaf.dtype) / gap, 0.0, 1.0)
    return share * leaf + (1 - share) * base

  return base_lib.of_one_model(combine, base='required')


@entries.register('arcee_fusion', base='required')
def arcee_fusion() -> base_lib.Merge:
  """Takes from the model only entries of outlying importance.

  Importance is `|model - base| * KL`, where KL compares, for each output unit,
  the softmax of the model's row with that of the base's. Entries at or above
  `median + 1.5 (Q3 - Q1)` of the leaf come from the model, all others from the
  base. Quantiles are exact, of the sorted values at index `floor(q (n - 1))`.

  Returns:
    A method over a base and exactly one model; it must know which axes of a
    kernel are inputs.

  Raises:
    UserError: a kernel of unknown layout.

  Example:
    >>> model = {'bias': jnp.array([0.01, 0.02, 0.03, 0.04, 5.0])}
    >>> merge([model], arcee_fusion(), base={'bias': jnp.zeros(5)})
    {'bias': Array([0., 0., 0., 0., 5.], dtype=float32)}

  Source: mergekit `arcee_fusion`, which estimates the quantiles of large leaves
  from a million random entries.
  """

  def importance(leaf, base):
    eps = jnp.asarray(1e-8, leaf.dtype)
    p = jax.nn.softmax(leaf, axis=-1) + eps
    q = jax.nn.softmax(base, axis=-1) + eps
    divergence = jnp.sum(p * jnp.log(p / q), axis=-1, keepdims=True)
    return (jnp.abs(leaf - base) * divergence).astype(jnp.float32)

  def measure(leaves, base, contexts, weights):
    del contexts, weights
    return [importance(leaves[0], base)]

  def ranks(size, contexts):
    del contexts
    # The value at ascending index i is the (size - i)-th largest.
    at = lambda q: size - math.floor(q * (size - 1))
    return [(at(0.25), at(0.5), at(0.75))]

  def conclude(found, contexts, weights):
    del contexts, weights
    low, middle, high = (cut.threshold for cut in found[0])
    return [{'outlying': middle + jnp.float32(1.5) * (high - low)}]

  def combine(leaf, base, context):
    taken = importance(leaf, base) >= context.note['outlying']
    return base + jnp.where(taken, leaf - base, jnp.zeros_like(leaf))

  return base_lib.of_one_model(
    combine,
    first_passes=(base_lib.FirstPass(measure, conclude, ranks),),
    base='required',
    view='unit',
  )
