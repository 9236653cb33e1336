# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is done to a task vector before it is merged: trim, drop, rescale.

The words from which TIES, DARE, DELLA and Model Breadcrumbs are composed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.methods import base as base_lib
from mergejax.methods import masks
from mergejax.methods.arithmetic import Edit

RESCALES = ('paper', 'l1', 'l2', 'linf', 'none')
# mergekit leaves a leaf alone when one of the two norms is below this.
_TINY_NORM = 1e-7


def check_density(density: Any) -> None:
  """Raises unless the kept share, or every one of a list, is in [0, 1].

  With 0, as at one end of a gradient, a task vector counts as zeros.
  """
  base_lib.check_option(
    'density',
    density,
    lambda value: 0 <= value <= 1,
    'in [0, 1], the share of a task vector that is kept',
  )


def _number(option: Any, model: int) -> float:
  """The number that an option has for a model, needed to count elements."""
  values: Any = option
  if not isinstance(option, (list, tuple)):
    values = np.asarray(option)
  value = values[model] if np.ndim(values) else values
  if numerics.is_traced(value):
    raise errors.ConfigError(
      'density and gamma count elements, so they must be plain numbers, not '
      'values that jit traces; mark them static.'
    )
  return float(value)


def _magnitudes(leaves, base, contexts, weights):
  del base, contexts, weights
  return [jnp.abs(leaf).astype(jnp.float32) for leaf in leaves]


def trim(density: Any, *, scope: str = 'tensor', keep: str = 'exact') -> Edit:
  """Keeps the largest magnitudes of a task vector, zeros the rest.

  Args:
    density: share that is kept, one number or one a model.
    scope: 'tensor' ranks every leaf by itself, 'global' all leaves of a model
      together.
    keep: 'exact' keeps `floor(density n)` elements, of a leaf at least one,
      equal magnitudes by lowest index; 'reference' keeps what is at or above
      the magnitude that follows them, as the original TIES code does: one
      element more, and all ties.

  Returns:
    An edit whose first pass finds one `Cut` a model.
  """
  check_density(density)
  base_lib.check_choice('trim_scope', scope, ('tensor', 'global'))
  base_lib.check_choice('keep', keep, ('exact', 'reference'))

  def rank(size, model):
    kept = math.floor(_number(density, model) * size)
    if _number(density, model) == 0:
      return 0
    if keep == 'reference':
      kept += 1
    elif scope == 'tensor':
      kept = max(1, kept)
    return min(kept, size)

  def ranks(size, contexts):
    return [(rank(size, k),) for k in range(len(contexts))]

  def conclude(found, contexts, weights):
    del contexts, weights
    notes = []
    for (cut,) in found:
      if keep == 'reference':
        cut = cut._replace(end=jnp.uint32(2**32 - 1))
      notes.append({'kept': cut})
    return notes

  def apply(delta, context):
    keep_it = numerics.above(
      jnp.abs(delta), context.note['kept'], context.index
    )
    return jnp.where(keep_it, delta, jnp.zeros_like(delta))

  first_pass = base_lib.FirstPass(
    _magnitudes,
    conclude,
    ranks,
    scope='tree' if scope == 'global' else 'leaf',
  )
  return Edit(apply, (first_pass,))


def trim_both_ends(density: Any, gamma: Any) -> Edit:
  """Drops the largest magnitudes and as many of the smallest as needed.

  Exactly `floor(density n)` elements of a leaf stay: the `floor(gamma n)`
  largest go (fewer if the density could not be kept otherwise), then the
  smallest.

  Args:
    density: share that is kept, one number or one a model.
    gamma: share of outliers that go, one number or one a model.

  Returns:
    An edit whose first pass finds two `Cut`s a model.
  """
  check_density(density)
  base_lib.check_option(
    'gamma', gamma, lambda value: 0 <= value < 1, 'in [0, 1)'
  )

  def ranks(size, contexts):
    result = []
    for k in range(len(contexts)):
      kept = math.floor(_number(density, k) * size)
      outliers = min(math.floor(_number(gamma, k) * size), size - kept)
      result.append((outliers, outliers + kept))
    return result

  def conclude(found, contexts, weights):
    del contexts, weights
    return [{'outliers': out, 'kept': kept} for out, kept in found]

  def apply(delta, context):
    size = jnp.abs(delta)
    inside = numerics.above(size, context.note['kept'], context.index)
    outlier = numerics.above(size, context.note['outliers'], context.index)
    return jnp.where(inside & ~outlier, delta, jnp.zeros_like(delta))

  return Edit(apply, (base_lib.FirstPass(_magnitudes, conclude, ranks),))


def _norm_terms(rescale, delta):
  size = jnp.abs(delta)
  if rescale == 'linf':
    return jnp.max(size, initial=0.0)
  return jnp.sum(size if rescale == 'l1' else jnp.square(size))


def rescaled(edit: Edit, rescale: str) -> Edit:
  """An edit whose result has the norm that the task vector had before it.

  Args:
    edit: what removes elements.
    rescale: 'l1', 'l2' or 'linf', the norm of a leaf that is restored; with
      'none' the edit is left as it is.

  Returns:
    An edit with one first pass more, of the two norms.
  """
  if rescale not in ('l1', 'l2', 'linf'):
    return edit

  def measure(leaves, base, contexts, weights):
    del base, weights
    return [
      (
        _norm_terms(rescale, delta),
        _norm_terms(rescale, edit.apply(delta, context)),
      )
      for delta, context in zip(leaves, contexts)
    ]

  def conclude(found, contexts, weights):
    del contexts, weights
    notes = []
    for before, after in found:
      if rescale == 'l2':
        before, after = jnp.sqrt(before), jnp.sqrt(after)
      match = (before > _TINY_NORM) & (after > _TINY_NORM)
      safe = jnp.where(match, after, jnp.ones_like(after))
      notes.append(
        {'rescale': jnp.where(match, before / safe, jnp.ones_like(before))}
      )
    return notes

  def apply(delta, context):
    factor = jnp.asarray(context.note['rescale'], delta.dtype)
    return edit.apply(delta, context) * factor

  combine = 'max' if rescale == 'linf' else 'sum'
  first_pass = base_lib.FirstPass(measure, conclude, combine=combine)
  return edit._replace(
    apply=apply, first_passes=(*edit.first_passes, first_pass)
  )


def _dropped(probability, rescale: str, view: str) -> Edit:
  """Drops elements at random; `probability(delta, context)` keeps each."""
  base_lib.check_choice('rescale', rescale, RESCALES)

  def masked(delta, context):
    chance = probability(delta, context)
    kept = masks.uniform(context.key, context.index) < chance
    if rescale == 'paper':
      # Where the chance is 0 nothing is kept; the 1 only avoids 0/0.
      safe = jnp.where(chance > 0, chance, jnp.ones_like(chance))
      delta = delta / safe.astype(delta.dtype)
    return jnp.where(kept, delta, jnp.zeros_like(delta))

  return rescaled(Edit(masked, (), view, numbered=True), rescale)


def drop(density: Any, *, rescale: str = 'paper') -> Edit:
  """Keeps every element with the same probability (DARE).

  Args:
    density: that probability, one number or one a model.
    rescale: 'paper' divides what is kept by the density, so that the mean over
      masks is the task vector; 'l1', 'l2', 'linf' restore that norm of the
      leaf exactly, 'l1' being what mergekit does; 'none' does neither.

  Returns:
    An edit; masks come from seed, path and model.
  """
  check_density(density)
  return _dropped(
    lambda delta, context: base_lib.of_model(density, context, jnp.float32),
    rescale,
    'element',
  )


def drop_by_rank(density: Any, epsilon: Any, *, rescale: str = 'paper') -> Edit:
  """Keeps larger elements of an output unit with higher probability (DELLA).

  Rank i of n by magnitude, ascending, is kept with probability
  `density - epsilon + 2 epsilon i / (n - 1)`; a unit of one element with
  `density`.

  Args:
    density: mean probability, one number or one a model.
    epsilon: half of the range of probabilities, likewise.
    rescale: see `drop`; 'paper' divides by each element's own probability.

  Returns:
    An edit of leaves seen as `[units, inputs]`.

  Raises:
    UserError: probabilities would leave (0, 1).
  """
  check_density(density)
  _check_range_of_chances(density, epsilon)

  def probability(delta, context):
    share = base_lib.of_model(density, context, jnp.float32)
    spread = base_lib.of_model(epsilon, context, jnp.float32)
    inputs = delta.shape[-1]
    order = jnp.argsort(jnp.abs(delta), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1).astype(jnp.float32)
    if inputs > 1:
      chance = share - spread + 2 * spread * rank / jnp.float32(inputs - 1)
    else:
      chance = jnp.full_like(rank, share)
    sure = jnp.where(share >= 1, jnp.ones_like(chance), chance)
    return jnp.where(share <= 0, jnp.zeros_like(chance), sure)

  return _dropped(probability, rescale, 'unit')


def _check_range_of_chances(density, epsilon):
  given = jax.tree.leaves([density, epsilon])
  if any(numerics.is_traced(value) for value in given):
    return
  count = max(np.size(density), np.size(epsilon))
  for share, spread in zip(
    np.broadcast_to(density, count), np.broadcast_to(epsilon, count)
  ):
    if 0 < share < 1 and not (0 < share - spread and share + spread < 1):
      raise errors.ConfigError(
        f'density {share} and epsilon {spread} give keep probabilities from '
        f'{share - spread:g} to {share + spread:g}: they must lie between 0 '
        'and 1. Choose a smaller epsilon.'
      )
