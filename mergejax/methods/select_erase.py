# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""SCE: select, calculate, erase."""

import math

import jax.numpy as jnp

from mergejax.core import numerics
from mergejax.methods import base as base_lib
from mergejax.methods import entries


@entries.register('sce', base='required', counted=('select_topk',))
def sce(*, select_topk: float = 1.0) -> base_lib.Merge:
  """SCE: keep where models vary most, weigh by energy, erase minorities.

  With `delta_k = theta_k - base` and V their variance over models at each
  position: keep the `floor(select_topk * nonzero(V))` positions of largest V;
  `c_k = sum(delta_k^2) / sum_j sum(delta_j^2)` over them; at each position
  only the sign of `sum_k delta_k` stays; `base + sum c_k m_k delta_k / sum c_k
  m_k`.

  Args:
    select_topk: share of the positions with any variance; 1, as in mergekit,
      keeps every position.

  Returns:
    A method over a base and any number of models; weights play no part. It
    holds all models' copies of a leaf, or of the piece of it at hand.

  Raises:
    UserError: `select_topk` outside (0, 1].

  Example:
    >>> merge([{'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([1.0, -1.0])}],
    ...       sce(), base={'w': jnp.zeros(2)})
    {'w': Array([1., 2.], dtype=float32)}

  Source: Wan et al., "FuseChat" (2024), https://arxiv.org/abs/2408.07990,
  section 3.3.
  """
  base_lib.check_option(
    'select_topk', select_topk, lambda value: 0 < value <= 1, 'in (0, 1]'
  )

  def ranks(size, contexts):
    if select_topk >= 1:
      return [(size,)]
    varying = contexts[0].note['varying']
    if numerics.is_traced(varying):  # under the caller's jit
      share = jnp.float32(select_topk) * varying.astype(jnp.float32)
      return [(jnp.floor(share).astype(jnp.uint32),)]
    return [(math.floor(select_topk * int(varying)),)]

  first_passes = (
    base_lib.FirstPass(_count, _counted),
    base_lib.FirstPass(_spreads, _selected, ranks),
    base_lib.FirstPass(_energies, _weighed),
  )
  return base_lib.gathered(_combine, first_passes=first_passes, base='required')


def _deltas_of(leaves, base):
  return [leaf - base for leaf in leaves]


def _variance(deltas):
  middle = sum(deltas) / len(deltas)
  # Several programs compute this, and must agree to the bit, or the one at the
  # cut is lost. A maximum stands between each product and the sum: without it a
  # compiler joins the two, rounds once, and does so in some programs alone.
  squares = sum(jnp.maximum(jnp.square(d - middle), 0) for d in deltas)
  return jnp.asarray(squares) / len(deltas)


def _count(leaves, base, contexts, weights):
  del contexts, weights
  spread = _variance(_deltas_of(leaves, base))
  return jnp.sum(spread != 0, dtype=jnp.uint32)


def _counted(found, contexts, weights):
  del weights
  return [{'varying': found}] * len(contexts)


def _spreads(leaves, base, contexts, weights):
  del contexts, weights
  return [_variance(_deltas_of(leaves, base)).astype(jnp.float32)]


def _selected(found, contexts, weights):
  del weights
  return [{'selected': found[0][0]}] * len(contexts)


def _masked(leaves, base, contexts):
  deltas = _deltas_of(leaves, base)
  keep = numerics.above(
    _variance(deltas), contexts[0].note['selected'], contexts[0].index
  )
  return [jnp.where(keep, d, jnp.zeros_like(d)) for d in deltas]


def _energies(leaves, base, contexts, weights):
  del weights
  return jnp.stack(
    [jnp.sum(jnp.square(d)) for d in _masked(leaves, base, contexts)]
  )


def _weighed(found, contexts, weights):
  del weights
  total = jnp.sum(found)
  even = jnp.full_like(found, 1 / len(contexts))
  small = total < 1e-6
  shares = jnp.where(small, even, found / jnp.where(small, 1.0, total))
  return [{'share': share} for share in shares]


def _combine(leaves, base, weights, contexts):
  del weights
  deltas = _masked(leaves, base, contexts)
  up = sum(deltas) >= 0
  top, bottom = jnp.zeros_like(base), jnp.zeros_like(base)
  for delta, context in zip(deltas, contexts):
    share = jnp.asarray(context.note['share'], base.dtype)
    agrees = jnp.where(up, delta > 0, delta < 0)
    top = top + jnp.where(agrees, share * delta, jnp.zeros_like(delta))
    bottom = bottom + jnp.where(agrees, share, jnp.zeros_like(share))
  return base + top / jnp.maximum(bottom, jnp.asarray(1e-6, base.dtype))
