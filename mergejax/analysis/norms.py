# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Running statistics of batch norms, measured anew on data."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.models import batch_norm

COLLECTION = batch_norm.COLLECTION


def refresh_norms(
  module: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
) -> typing.Tree:
  """Mean and variance of every batch norm, over all real rows of the data.

  Averaged weights have other activations than either model, so averaged
  statistics are wrong, and the barrier they make has nothing to do with
  alignment. With n_b rows, mean m_b and variance v_b of what a norm is given in
  batch b, `m = sum n_b m_b / n` and `v = sum n_b (v_b + m_b^2) / n - m^2`: no
  momentum, so neither the order nor the cut of the data matters to a norm
  whose inputs do not (later ones are given what training would give them).

  Args:
    module: the model: its module, or its family.
    params: its parameters, with `batch_stats`; without them nothing changes.
    batches: one pass over the data. Rows whose `weights` are 0 fill a batch up
      and are left out; what is left of a batch is compiled for its size.

  Returns:
    The same parameters with new running statistics.

  Raises:
    UserError: no real row, weights other than 0 and 1, running statistics of
      other layers than `nn.BatchNorm`, numbers that are not finite.

  Source: the update after averaging of Izmailov et al. (2018),
  https://arxiv.org/abs/1803.05407, section 3.2.
  """
  if COLLECTION not in params:
    return params
  old = tree_lib.flatten(params[COLLECTION])
  measure = jax.jit(lambda params, batch: _of_batch(module, params, batch))
  rows, totals = 0, {}
  for batch in batches:
    batch, count = _real_rows(batch)
    if not count:
      continue
    rows += count
    for path, (mean, variance) in measure(params, batch).items():
      mean, variance = np.float64(mean), np.float64(variance)
      moments = np.stack([mean, variance + mean**2])
      totals[path] = totals.get(path, 0.0) + moments * count
  if not rows:
    raise errors.DataError(
      'There was no real row of data to measure batch norms on.'
    )
  new = {}
  for path, total in totals.items():
    mean, square = total / rows
    new[f'{path}/mean'] = mean
    new[f'{path}/var'] = np.maximum(square - mean**2, 0.0)
  bad = [path for path, leaf in new.items() if not np.isfinite(leaf).all()]
  if bad:
    raise errors.DataError(
      'These running statistics are not finite; does the model give finite '
      f'outputs on this data?\n{errors.listed(bad)}'
    )
  cast = {p: jax.numpy.asarray(new[p], leaf.dtype) for p, leaf in old.items()}
  return {**params, COLLECTION: tree_lib.unflatten(cast)}


def _real_rows(batch):
  """A batch without its filling, and how many rows that leaves."""
  batch = {name: np.asarray(leaf) for name, leaf in batch.items()}
  rows = len(next(iter(batch.values())))
  weights = batch.get('weights')
  if weights is None:
    return batch, rows
  if not np.isin(weights, (0, 1)).all():
    raise errors.DataError(
      'Batch norms count a row or they do not: `weights` of a batch must be 0 '
      'or 1 to measure them anew.'
    )
  real = weights > 0
  if real.all():
    return batch, rows
  kept = {name: leaf[real] for name, leaf in batch.items()}
  return kept, int(real.sum())


def _of_batch(module, params, batch):
  """`{path of a norm: (mean, variance)}` of what it is given."""
  momenta = {}

  def interceptor(call, arguments, named, context):
    layer = context.module
    if isinstance(layer, nn.BatchNorm):
      momenta['/'.join(layer.path)] = layer.momentum
    return call(*arguments, **named)

  stats = params[COLLECTION]
  zeros = jax.tree.map(jax.numpy.zeros_like, stats)
  with nn.intercept_methods(interceptor):
    family = models.family_for(module, batch)
    variables = family.variables({**params, COLLECTION: zeros})
    _, changed = family.call(variables, batch, train=True)
  new = tree_lib.flatten(changed[COLLECTION])
  known = {f'{path}/{name}' for path in momenta for name in ('mean', 'var')}
  unknown = sorted(set(new) - known)
  if unknown:
    raise errors.StructureError(
      'Only running statistics of nn.BatchNorm can be measured anew, not '
      f'these:\n{errors.listed(unknown)}'
    )
  # An update from zero leaves `1 - momentum` of what the batch has.
  share = lambda path, name: new[f'{path}/{name}'] / (1 - momenta[path])
  return {
    path: (share(path, 'mean'), share(path, 'var'))
    for path in momenta
    if f'{path}/mean' in new
  }
