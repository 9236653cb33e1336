# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Means on the sphere: SLERP and its relatives.

Every one of them returns a linear combination of the models whose coefficients
depend only on their inner products. So one pass over a leaf takes the K x K
matrix of inner products, the geometry is done on that, and a second pass
combines: a leaf of any size and sharding needs no more memory than a mean.
"""

import jax.numpy as jnp

from mergejax.core import typing
from mergejax.methods import base as base_lib
from mergejax.methods import entries
from mergejax.methods import mean

# Beyond this cosine, or its negative, SLERP is a straight line.
_PARALLEL = 0.9995


def inner_products(
  leaves: list[typing.Array], axis: int | None = None
) -> typing.Array:
  """<float32>[K, K] inner products, or [K, K, ...] along one axis only."""
  rows = []
  for i, first in enumerate(leaves):
    row = [rows[j][i] for j in range(i)]
    rows.append(row + [jnp.sum(first * b, axis=axis) for b in leaves[i:]])
  return jnp.stack([jnp.stack(row) for row in rows])


def _inner_product_pass(coefficients) -> base_lib.FirstPass:
  """A first pass that turns inner products into a coefficient for each model."""

  def measure(leaves, base, contexts, weights):
    del contexts, weights
    if base is not None:
      leaves = [leaf - base for leaf in leaves]
    return inner_products(leaves)

  def conclude(found, contexts, weights):
    del contexts
    values = coefficients(found, jnp.stack(list(weights)).astype(found.dtype))
    return [{'coefficient': value} for value in values]

  return base_lib.FirstPass(measure, conclude)


def _arc(first, second, angle, t):
  """Coefficients of the arc between two vectors, given the angle."""
  sine = jnp.sin(angle)
  safe = jnp.where(sine == 0, jnp.ones_like(sine), sine)
  return (
    jnp.where(sine == 0, first, jnp.sin((1 - t) * angle) / safe),
    jnp.where(sine == 0, second, jnp.sin(t * angle) / safe),
  )


def _cosine(products: typing.Array, i: int, j: int) -> typing.Array:
  """Cosine of models i and j; a norm of (almost) zero counts as one."""
  norms = [jnp.sqrt(products[k, k]) for k in (i, j)]
  norms = [jnp.where(n <= 1e-8, jnp.ones_like(n), n) for n in norms]
  return jnp.clip(products[i, j] / (norms[0] * norms[1]), -1.0, 1.0)


@entries.register('slerp', base='required')
def slerp(*, t: float) -> base_lib.Merge:
  """Spherical interpolation from the base to one model, leaf by leaf.

  `[sin((1-t) A) base + sin(t A) model] / sin A` with A the angle between the
  two leaves seen as vectors; the straight line where they are parallel or
  opposite (`|cos A| > 0.9995`).

  Args:
    t: 0 gives the base, 1 the model. It has no default.

  Returns:
    A method over a base and exactly one model.

  Example:
    >>> merge([{'w': jnp.array([0.0, 1.0])}], slerp(t=0.5),
    ...       base={'w': jnp.array([1.0, 0.0])})
    {'w': Array([0.70710677, 0.70710677], dtype=float32)}

  Source: Shoemake, "Animating rotation with quaternion curves" (1985), applied
  to weights by mergekit `slerp`.
  """
  base_lib.check_finite('t', t)

  def measure(leaves, base, contexts, weights):
    del contexts, weights
    return inner_products([base, *leaves])

  def conclude(found, contexts, weights):
    del contexts, weights
    share = jnp.asarray(t, found.dtype)
    cosine = _cosine(found, 0, 1)
    start, end = _arc(1 - share, share, jnp.arccos(cosine), share)
    straight = jnp.abs(cosine) > _PARALLEL
    return [
      {
        'base': jnp.where(straight, 1 - share, start),
        'coefficient': jnp.where(straight, share, end),
      }
    ]

  def combine(leaf, base, context):
    cast = lambda name: jnp.asarray(context.note[name], leaf.dtype)
    return cast('base') * base + cast('coefficient') * leaf

  return base_lib.of_one_model(
    combine,
    first_passes=(base_lib.FirstPass(measure, conclude),),
    base='required',
  )


@entries.register('nuslerp', base='optional')
def nuslerp(
  *, flatten: bool = True, axis: str = 'output_unit'
) -> base_lib.Merge:
  """Spherical interpolation of two models by weight.

  SLERP with `t = w_2 / (w_1 + w_2)`; of their task vectors, added to the base,
  if a base is given. A straight line only where `sin A < 1e-8`.

  Args:
    flatten: one angle for a leaf; otherwise one for each vector along `axis`.
    axis: 'output_unit' or 'input_feature': what one vector belongs to.
      mergekit's `nuslerp_row_wise: false` is 'output_unit' and `true` is
      'input_feature', contrary to its documentation.

  Returns:
    A method over exactly two models, and a base or none.

  Example:
    >>> merge([{'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([0.0, 1.0])}],
    ...       nuslerp())
    {'w': Array([0.70710677, 0.70710677], dtype=float32)}

  Source: mergekit `nuslerp`.
  """
  base_lib.check_choice('axis', axis, ('output_unit', 'input_feature'))

  def coefficients(products, weights):
    total = weights[0] + weights[1]
    none = jnp.abs(total) < mean.TINY_WEIGHT
    safe = jnp.where(none, jnp.ones_like(total), total)
    t = jnp.where(none, jnp.full_like(total, 0.5), weights[1] / safe)
    angle = jnp.arccos(_cosine(products, 0, 1))
    straight = jnp.sin(angle) < 1e-8
    first, second = _arc(1 - t, t, angle, t)
    return (
      jnp.where(straight, 1 - t, first),
      jnp.where(straight, t, second),
    )

  fields = dict(base='optional', counts=(2, 2))
  if flatten:
    first_pass = _inner_product_pass(coefficients)
    return mean.combination(first_passes=(first_pass,), **fields)

  def combine(leaves, base, weights, contexts):
    del contexts
    if base is not None:
      leaves = [leaf - base for leaf in leaves]
    first, second = coefficients(
      inner_products(leaves, axis=-1), jnp.stack(weights)
    )
    arc = first[..., None] * leaves[0] + second[..., None] * leaves[1]
    return arc if base is None else base + arc

  view = {'output_unit': 'unit', 'input_feature': 'input'}[axis]
  return base_lib.gathered(combine, view=view, **fields)


@entries.register('multislerp', base='optional', averages='normalize_weights')
def multislerp(
  *, normalize_weights: bool = True, eps: float = 1e-8
) -> base_lib.Merge:
  """Weighted direction of several models times their weighted norm.

  With `u_k = theta_k / (|theta_k| + eps)`: `(sum_k w_k |theta_k|) *
  (sum_k w_k u_k) / |sum_k w_k u_k|`; of task vectors, added to the base, if a
  base is given. One step on the tangent plane at the mean direction, which
  mergekit takes next, is zero by construction.

  Args:
    normalize_weights: divide the weights by their sum.
    eps: added to norms, so that a leaf of zeros has a direction of zeros.

  Returns:
    A method over any number of models, and a base or none.

  Example:
    >>> merge([{'w': jnp.array([3.0, 0.0])}, {'w': jnp.array([0.0, 1.0])}],
    ...       multislerp())
    {'w': Array([1.4142135, 1.4142135], dtype=float32)}

  Source: mergekit `multislerp`. Where the weighted directions cancel, the
  weighted mean is returned.
  """

  def coefficients(products, weights):
    if normalize_weights:
      weights = weights / mean.checked_sum(jnp.sum(weights))
    norms = jnp.sqrt(jnp.diagonal(products))
    per_unit = weights / (norms + jnp.asarray(eps, norms.dtype))
    length = jnp.sqrt(jnp.maximum(per_unit @ products @ per_unit, 0.0))
    cancelled = length < jnp.asarray(eps, length.dtype)
    safe = jnp.where(cancelled, jnp.ones_like(length), length)
    arc = per_unit * jnp.sum(weights * norms) / safe
    return jnp.where(cancelled, weights, arc)

  return mean.combination(
    first_passes=(_inner_product_pass(coefficients),), base='optional'
  )


@entries.register('karcher', base='ignored')
def karcher(*, max_iter: int = 10, tol: float = 1e-5) -> base_lib.Merge:
  """The mean on the sphere (Karcher mean), times the mean norm.

  The unit vector u for which the tangent steps towards the models' directions
  sum to zero, by fixed-point iteration from the normalized mean; every model
  counts the same. Iterates on coefficients, so the models are read twice,
  however many rounds it takes.

  Args:
    max_iter: rounds at most; 10 as in mergekit.
    tol: stop when the tangent step is shorter than this.

  Returns:
    A method over any number of models. Leaves of zeros have no direction and
    count only in the mean norm.

  Example:
    >>> merge([{'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([0.0, 1.0])}],
    ...       karcher())
    {'w': Array([0.70710677, 0.70710677], dtype=float32)}

  Source: Karcher, "Riemannian center of mass and mollifier smoothing" (1977);
  mergekit `karcher`.
  """

  def coefficients(products, weights):
    del weights
    norms = jnp.sqrt(jnp.diagonal(products))
    alive = norms > jnp.asarray(tol, norms.dtype)
    safe = jnp.where(alive, norms, jnp.ones_like(norms))
    cosines = products / (safe[:, None] * safe[None, :])
    alive = alive.astype(norms.dtype)
    share = alive / jnp.maximum(jnp.sum(alive), 1.0)
    length = lambda c: jnp.sqrt(jnp.maximum(c @ cosines @ c, 0.0))
    start = share / jnp.maximum(length(share), 1e-20)
    # Directions that cancel leave no mean to start from: take the first model.
    first = jnp.zeros_like(share).at[jnp.argmax(alive)].set(1.0)
    u = jnp.where(length(share) < tol, first, start)
    done = jnp.zeros((), bool)
    for _ in range(max_iter):
      cosine = jnp.clip(cosines @ u, -1.0, 1.0)
      # arctan2 keeps digits where arccos near 1 loses them; sine 0 at the
      # antipode would blow the step up, so it takes no part.
      sine = jnp.sqrt(jnp.maximum(1.0 - jnp.square(cosine), 0.0))
      angle = jnp.arctan2(sine, cosine)
      far = (angle > tol) & (sine > 1e-6)
      pull = jnp.where(far, angle / jnp.where(far, sine, 1.0), 0.0) * share
      step = pull - jnp.sum(pull * cosine) * u
      size = length(step)
      done = done | (size < tol)
      safe_size = jnp.where(size == 0, 1.0, size)
      moved = jnp.cos(size) * u + jnp.sin(size) * step / safe_size
      moved = moved / jnp.maximum(length(moved), 1e-20)
      u = jnp.where(done, u, moved)
    return u / safe * jnp.mean(norms)

  return mean.combination(first_passes=(_inner_product_pass(coefficients),))


@entries.register('model_stock', base='required')
def model_stock(
  *, filter_wise: bool = False, clamp_t: bool = False
) -> base_lib.Merge:
  """Model stock: how far from the base to the mean, from the angle between.

  `t mean_k(theta_k) + (1 - t) base`, `t = N c / (1 + (N - 1) c)`, with c the
  mean cosine between pairs of task vectors of the leaf.

  Args:
    filter_wise: one t for each output unit of a kernel instead of one a leaf.
    clamp_t: keep t in [0, 1]. Off by default, as in mergekit: negative cosines
      then give t < 0; near the pole `c = -1/(N-1)` the base is returned.

  Returns:
    A method over a base and at least two models.

  Example:
    >>> merge([{'w': jnp.array([1.0, 0.0])}, {'w': jnp.array([0.0, 1.0])}],
    ...       model_stock(), base={'w': jnp.zeros(2)})
    {'w': Array([0., 0.], dtype=float32)}

  Source: Jang et al., "Model Stock" (2024), https://arxiv.org/abs/2403.19522,
  derived for N = 2; averaging the cosines of pairs for larger N is mergekit's.
  """

  def share(products):
    """t / N, for [K, K] or [K, K, units] inner products."""
    count = products.shape[0]
    norms = [jnp.sqrt(products[k, k]) for k in range(count)]
    cosines = [
      jnp.clip(
        products[i, j] / jnp.maximum(norms[i] * norms[j], 1e-6), -1.0, 1.0
      )
      for i in range(count)
      for j in range(i)
    ]
    cosine = sum(cosines) / len(cosines)
    bottom = 1 + (count - 1) * cosine
    pole = jnp.abs(bottom) < 1e-6
    t = jnp.where(
      pole,
      jnp.zeros_like(bottom),
      count * cosine / jnp.where(pole, jnp.ones_like(bottom), bottom),
    )
    return (jnp.clip(t, 0.0, 1.0) if clamp_t else t) / count

  fields = dict(base='required', counts=(2, None))
  if not filter_wise:
    first_pass = _inner_product_pass(lambda products, weights: (
      jnp.broadcast_to(share(products), (products.shape[0],))
    ))  # fmt: skip
    return mean.combination(first_passes=(first_pass,), **fields)

  def combine(leaves, base, weights, contexts):
    del weights, contexts
    deltas = [leaf - base for leaf in leaves]
    part = share(inner_products(deltas, axis=-1))
    return base + part[..., None] * sum(deltas)

  return base_lib.gathered(combine, view='unit', **fields)
