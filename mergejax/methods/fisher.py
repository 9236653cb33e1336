# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fisher-weighted averaging."""

import jax.numpy as jnp

from mergejax.core import statistic_specs
from mergejax.methods import base as base_lib
from mergejax.methods import entries


@entries.register('fisher', base='ignored')
def fisher(
  *,
  normalize_fishers: str = 'model',
  floor: float = 1e-6,
  floor_mode: str = 'absolute',
  favor_first: bool = True,
  smoothing: float = 0.0,
) -> base_lib.Merge:
  """Averages each entry by how much it matters to each model.

  `sum_k l_k F_k theta_k / sum_k l_k F_k` with F_k the diagonal Fisher
  information of model k and `l_k = w_k / |F_k|_2`. Where no model has any
  information the first model's value stays (or, without `favor_first`, the
  weighted mean).

  Args:
    normalize_fishers: 'model' divides each Fisher by its norm over the whole
      model, as the paper's code; 'leaf' by its norm over the leaf; 'none'.
    floor: smallest Fisher value; 1e-6 as in the paper's code. The floor acts
      before the normalization.
    floor_mode: 'absolute', or 'relative' to the mean of the first model's
      Fisher: Fishers of converged models can lie far below 1e-6.
    favor_first: floor only the first model's Fisher, so that its value stays
      where nobody knows better; otherwise floor every model's.
    smoothing: added to every Fisher; 1e-10 in the RegMean project's variant,
      which has no floor.

  Returns:
    A method over models that bring `fisher` statistics. State of a leaf:
    <float32>[...] weighted sum, sum of weights, and what to fall back on.

  Raises:
    UserError: an unknown mode, a negative floor or smoothing.

  Example:
    >>> merge([{'w': jnp.zeros(1)}, {'w': jnp.ones(1)}],
    ...       fisher(normalize_fishers='none'),
    ...       stats=[{'w': {'fisher': jnp.array([1.0])}},
    ...              {'w': {'fisher': jnp.array([3.0])}}])
    {'w': Array([0.75], dtype=float32)}

  Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging"
  (2022), https://arxiv.org/abs/2111.09832, equation 2. The released code gives
  NaN where all weights are zero.
  """
  base_lib.check_choice('normalize_fishers', normalize_fishers, ('model', 'leaf', 'none'))  # fmt: skip
  base_lib.check_choice('floor_mode', floor_mode, ('absolute', 'relative'))
  for name, value in (('floor', floor), ('smoothing', smoothing)):
    base_lib.check_not_negative(name, value)

  conclude = _scales(normalize_fishers, floor, floor_mode, smoothing)
  scope = 'tree' if normalize_fishers != 'leaf' else 'leaf'
  first_passes = (
    base_lib.FirstPass(_peak, _peaks, combine='max', scope=scope),
    base_lib.FirstPass(_measure, conclude, scope=scope),
  )
  return base_lib.leafwise(
    _init,
    _update(favor_first, smoothing),
    _finish,
    first_passes=first_passes,
    needs=(statistic_specs.FISHER,),
  )


def _scales(normalize_fishers, floor, floor_mode, smoothing):
  """What the second pass concludes: factor and floor of each Fisher."""

  def conclude(found, contexts, weights):
    del weights
    squares = jnp.asarray(found['squares'])
    heights = jnp.stack([
      jnp.asarray(context.note['peak'], squares.dtype) for context in contexts
    ])  # fmt: skip
    norms = heights * jnp.sqrt(squares)
    smooth = jnp.asarray(smoothing, norms.dtype)
    total = norms + smooth
    nothing = total == 0
    scale = jnp.where(nothing, 0.0, 1 / jnp.where(nothing, 1.0, total))
    # The variant with smoothing also makes the scales sum to one.
    share = scale / jnp.maximum(jnp.sum(scale), jnp.finfo(scale.dtype).tiny)
    scale = jnp.where(smooth > 0, share, scale)
    least = jnp.asarray(floor, norms.dtype)
    if floor_mode == 'relative':
      mean = jnp.asarray(found['total'] / found['size'], norms.dtype)
      least = least * heights[0] * mean
    if normalize_fishers == 'none':
      scale = jnp.ones_like(scale)
    return [{'scale': scale[k], 'floor': least} for k in range(len(contexts))]

  return conclude


def _init(zeros):
  return {
    'sum': zeros, 'weight': zeros, 'fallback': zeros,
    'fallback_weight': jnp.zeros((), zeros.dtype),
  }  # fmt: skip


def _update(favor_first, smoothing):
  """Adds a model, each entry by its information."""

  def update(state, leaf, base, weight, context):
    del base
    information = _information(leaf, context)
    information = information + jnp.asarray(smoothing, leaf.dtype)
    floored = jnp.maximum(
      information, jnp.asarray(context.note['floor'], leaf.dtype)
    )
    first = jnp.asarray(context.model) == 0
    if favor_first:
      information = jnp.where(first, floored, information)
      backing = jnp.where(first, jnp.ones_like(weight), jnp.zeros_like(weight))
    else:
      information, backing = floored, weight
    share = (
      weight * jnp.asarray(context.note['scale'], leaf.dtype) * information
    )
    return {
      'sum': state['sum'] + share * leaf,
      'weight': state['weight'] + share,
      'fallback': state['fallback'] + backing * leaf,
      'fallback_weight': state['fallback_weight'] + backing,
    }

  return update


def _finish(state, base):
  del base
  known = state['weight'] > 0
  safe = jnp.where(known, state['weight'], jnp.ones_like(state['weight']))
  return jnp.where(
    known,
    state['sum'] / safe,
    state['fallback'] / state['fallback_weight'],
  )


def _information(leaf, context):
  return context.stats['fisher'].astype(leaf.dtype)


def _peak(leaves, base, contexts, weights):
  del base, weights
  return [
    jnp.max(_information(leaf, context), initial=0.0)
    for leaf, context in zip(leaves, contexts)
  ]


def _peaks(found, contexts, weights):
  del contexts, weights
  return [
    {'peak': jnp.where(peak > 0, peak, jnp.ones_like(peak))} for peak in found
  ]


def _measure(leaves, base, contexts, weights):
  del base, weights
  # Squares of 1e-20 or 1e20 are not float32 numbers: the largest becomes 1.
  wide = [
    _information(leaf, context) / jnp.asarray(context.note['peak'], leaf.dtype)
    for leaf, context in zip(leaves, contexts)
  ]
  return {
    'squares': jnp.stack([jnp.sum(jnp.square(f)) for f in wide]),
    'total': jnp.sum(wide[0]),
    'size': jnp.full((), wide[0].size, jnp.float32),
  }
