# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Activation matching: units that answer alike are the same unit."""

from collections.abc import Callable, Iterable, Mapping
import logging
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.align import pairs as pairs_lib
from mergejax.align import spec as spec_lib
from mergejax.align import weights as weights_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.intercept import capture
from mergejax.intercept import linear
from mergejax.methods import base as merge_base

_HIGHEST = jax.lax.Precision.HIGHEST


def match_activations(
  spec: spec_lib.PermutationSpec,
  module: nn.Module,
  a: typing.Tree,
  b: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
  *,
  similarity: str = 'inner',
  mask: capture.Mask | None = None,
  kernels: Mapping[type, linear.Describe] | None = None,
  apply: Callable[..., Any] | None = None,
) -> spec_lib.Permutation:
  """Permutes b's units so that they answer as a's do, in one pass over data.

  For each group the activations that the next linear maps are given are
  compared, `S = mean of z_a z_b^T` over examples and positions (and over the
  places where a residual stream is read); then one assignment a group, no
  iteration.

  Args:
    spec: the groups.
    module: the model's module, or its family.
    a: the model to be matched.
    b: the model to be permuted.
    batches: dicts of arrays; padding counts for nothing.
    similarity: 'inner' is the uncentred mean product, which minimises `sum |z_a
      - P z_b|^2` (the paper); 'pearson' the correlation (the released VGG
      script), 0 for units that never change.
    mask: see `stats.gram`.
    kernels: see `stats.gram`.
    apply: see `stats.gram`.

  Returns:
    `{group: index}`; groups that no linear map reads stay, with a warning.

  Raises:
    UserError: trees that do not fit the specification, no batch, an unknown
      similarity, activations that are not finite.

  Source: Ainsworth et al. (2023), https://arxiv.org/abs/2209.04836, section
  3.1.
  """
  merge_base.check_choice('similarity', similarity, ('inner', 'pearson'))
  spec_lib.check_model(spec, a, 'model a')
  spec_lib.check_model(spec, b, 'model b')
  watched = _watched(spec, a)
  every = pairs_lib.units(spec)
  taps: dict[typing.Path, list[spec_lib.Factor]] = {}

  @jax.jit
  def measure(a, b, batch):
    weigh = capture.mask_for(mask, module, batch)

    def rows(params):
      met = capture.Met()

      def reduce(path, inputs):
        convolves = path in met.convolutions
        size = inputs.shape[-1]
        taps[path] = _read_factors(path, watched[path], size, convolves)
        return _rows(path, inputs, taps[path], weigh(path, batch))

      return capture.inputs_of(
          module, params, batch, reduce, wanted=watched.__contains__,
          kernels={nn.Conv: _whole_conv, **(kernels or {})}, apply=apply,
          met=met,
      )  # fmt: skip

    first, second = rows(a), rows(b)
    units = lambda path: any(f.name in spec.groups for f in taps[path])
    return {
      path: _moments(first[path], second[path]) for path in first if units(path)
    }

  totals = None
  a, b = jax.device_put(a), jax.device_put(b)
  for batch in batches:
    found = jax.device_get(
      measure(a, b, jax.tree.map(jnp.asarray, dict(batch)))
    )
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    if totals is None:
      totals = found
    else:
      totals = jax.tree.map(np.add, totals, found)
  if totals is None:
    raise errors.DataError('There was no batch to compare activations on.')
  permutation = spec_lib.identity(spec)
  stay = []
  for name, unit in every.items():
    sums = statistics(spec, unit, taps, totals, similarity)
    if not sums:
      stay.append(name)
      continue
    new, _ = weights_lib.assign(spec, unit, sums, permutation)
    permutation |= new
  if stay:
    logging.warning(
      'No linear map reads the units of %s; they stay.', ', '.join(stay)
    )
  return permutation


def _whole_conv(module, method, arguments):
  """Channels of an image; its positions are rows."""
  del module
  return [('kernel', arguments[0])] if method == '__call__' else []


def _watched(spec, params):
  """`{path of a kernel: factors of its axes}` of those that carry groups.

  Without axes that stack layers.
  """
  result = {}
  for path, leaf in tree_lib.flatten(params).items():
    axes = [
      axis
      for axis in spec.leaves[path]
      if not any(f.name in spec.stacks for f in axis)
    ]
    named = any(f.name in spec.groups for axis in axes for f in axis)
    if named and len(axes) > 1 and numerics.is_averaged(leaf.dtype):
      result[path] = axes
  return result


def _read_factors(path, axes, size, convolves):
  """The factors of a kernel's inputs, which have `size` features.

  Flax lays input axes first. Of a convolution the channels alone are read, of
  an embedding that is the output layer its second axis.
  """
  if convolves:
    return list(axes[-2])
  if path.rpartition('/')[2] == 'embedding':
    return list(axes[-1])
  for count in range(1, len(axes)):
    factors = [f for axis in axes[:count] for f in axis]
    if math.prod(f.size for f in factors) == size:
      return factors
  sizes = [math.prod(f.size for f in axis) for axis in axes]
  raise errors.StructureError(
    f'{path} {sizes} is given {size} features, which are not its first axes; '
    'without knowing which they are its units cannot be compared. Match by '
    'weights instead, or give `kernels` that leave it out.'
  )


def _rows(path, inputs, factors, mask):
  """Rows of units: `(<float32>[rows, units], weights <float32>[rows])`.

  Factors that may not move are positions: they become rows.
  """
  weights = capture.row_weights(mask, inputs, path)
  lead = inputs.shape[:-1]
  if weights is None:
    weights = jnp.ones(lead, jnp.float32)
  sizes = [f.size for f in factors]
  wide = inputs.astype(jnp.float32).reshape(*lead, *sizes)
  moving = [i for i, f in enumerate(factors) if f.name is not None]
  still = [i for i in range(len(factors)) if i not in moving]
  at = len(lead)
  order = [*range(at), *(at + i for i in still), *(at + i for i in moving)]
  units = math.prod(sizes[i] for i in moving)
  repeat = math.prod(sizes[i] for i in still)
  rows = jnp.transpose(wide, order).reshape(-1, units)
  weights = jnp.repeat(weights.reshape(-1), repeat)
  # What stands in padding is arbitrary, even infinite.
  return jnp.where(weights[:, None] > 0, rows, 0.0), weights


def _moments(first, second):
  """Sums over rows; lifted layers keep their stack in front."""
  (za, weights), (zb, _) = first, second
  wb = zb * weights[..., None]
  return {
    'ab': jnp.einsum('...ri,...rj->...ij', za, wb, precision=_HIGHEST),
    'a': jnp.sum(za * weights[..., None], axis=-2),
    'b': jnp.sum(wb, axis=-2),
    'aa': jnp.sum(jnp.square(za) * weights[..., None], axis=-2),
    'bb': jnp.sum(zb * wb, axis=-2),
    'n': jnp.sum(weights, axis=-1),
  }


def _similarity(sums, kind):
  """`[stack, units, units]` mean products or correlations."""
  n = sums['n'].reshape(-1, 1, 1)
  size = sums['a'].shape[-1]
  product = sums['ab'].reshape(-1, size, size) / n
  if kind == 'inner':
    return product
  vector = lambda name: sums[name].reshape(-1, size) / n[..., 0]
  mean_a, mean_b = vector('a'), vector('b')
  spread = lambda square, mean: np.sqrt(np.maximum(square - mean**2, 0))
  deviation_a = spread(vector('aa'), mean_a)
  deviation_b = spread(vector('bb'), mean_b)
  covariance = product - mean_a[:, :, None] * mean_b[:, None, :]
  scale = deviation_a[:, :, None] * deviation_b[:, None, :]
  # A unit that never changes correlates with nothing; rounding would say else.
  least = 1e-6 * (1 + np.abs(mean_a[:, :, None] * mean_b[:, None, :]))
  return np.where(
    scale > least * 1e-6, covariance / np.maximum(scale, 1e-300), 0
  )


def statistics(
  spec: spec_lib.PermutationSpec,
  unit: pairs_lib.Unit,
  taps: Mapping[typing.Path, list[spec_lib.Factor]],
  totals: Mapping[typing.Path, Mapping[str, np.ndarray]],
  kind: str,
) -> dict[str | None, np.ndarray]:
  """Similarities of a unit's positions, averaged over where they are read.

  Returns:
    `{child: <float64>[stack, n, m, n, m]}` as `weights.assign` takes them.
  """
  found: dict[str | None, list[np.ndarray]] = {}
  for path, factors in taps.items():
    names = [f.name for f in factors if f.name is not None]
    if unit.name not in names or path not in totals:
      continue
    child = next((c for c in unit.children if c in names), None)
    if set(names) - {unit.name, child}:
      continue  # units of another group are mixed in
    whole = _similarity(totals[path], kind)
    n = spec.groups[unit.name].size
    m = whole.shape[-1] // n
    laid = whole.reshape(-1, n, m, n, m)
    if unit.stack and len(laid) == 1:
      continue
    if not unit.stack:
      laid = laid.mean(axis=0, keepdims=True)
    found.setdefault(child, []).append(laid)
  return {
    child: np.asarray(sum(several)) / len(several)
    for child, several in found.items()
  }
