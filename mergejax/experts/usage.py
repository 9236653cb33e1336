# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How much each expert of a sparse model is used, and models with fewer.

Source: Li et al., "Merge, Then Compress" (2023),
https://arxiv.org/abs/2310.01334, merges experts by usage.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from scipy import optimize

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.experts import sparse_layers
from mergejax.experts import upcycle
from mergejax.nn import moe_metrics

PRUNE, MERGE = 'prune', 'merge'
HOW = (PRUNE, MERGE)


class Usage(NamedTuple):
  """What a router does with the tokens of a sparse layer.

  Attributes:
    load: `<float64>[experts]`, shares of the kept pairs; they sum to 1.
    gate: mean weight that a kept pair's output is multiplied by.
    experts: how many a token has on average, those without room left out.
  """

  load: np.ndarray
  gate: float
  experts: float


def measure(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
) -> dict[str, Usage]:
  """The usage of every sparse layer, in evaluation mode.

  Args:
    model: sparse, of the family 't5x' or 'lm'.
    params: its parameters.
    batches: what it is given; every batch counts by its weights.

  Returns:
    `{'decoder/layers_1/mlp': usage}`, for scanned layers too.

  Raises:
    ConfigError: a model without experts.
    DataError: no batch, or none with a token that counts.
  """
  family = sparse_layers.family_of(model, sparse=True)
  variables = jax.device_put(family.variables(params))
  call = jax.jit(
    lambda variables, batch: family.call(
      variables, batch, mutable=[moe_metrics.COLLECTION]
    )[1]
  )
  sums: dict[str, np.ndarray] = {}
  total = 0.0
  for batch in batches:
    weight = float(np.sum(family.target_weights(batch)))
    left = jax.device_get(call(variables, dict(batch)))[moe_metrics.COLLECTION]
    left = tree_lib.flatten(left)
    for path, load in left.items():
      layer, _, name = path.rpartition('/')
      if name == 'expert_load':
        more = [
          np.asarray(left[f'{layer}/{name}'])[..., None]
          for name in ('router_confidence', 'experts_per_token')
        ]
        told = np.concatenate([load, *more], -1).astype(np.float64)
        sums[layer] = sums.get(layer, 0.0) + weight * told
    total += weight
  if not total:
    raise errors.DataError(
      'The usage of experts needs a batch with a token that counts.'
    )
  found = {}
  for layer in sorted(sums, key=moe_metrics.by_number):
    told = sums[layer]
    one_by_one = told.reshape(-1, told.shape[-1]) / total
    for i, row in enumerate(one_by_one):
      *own, gate, of_token = row.tolist()
      load = np.array(own) / max(sum(own), 1e-12)
      found[_layer(layer, i, told.ndim)] = Usage(load, gate, of_token)
  return found


def _layer(path, number, rank):
  """A layer of a scanned stack by its number; others have their own path."""
  if rank == 1:
    return path
  stack, _, rest = path.partition('/')
  return f'{stack}/layers_{number}/{rest.partition("/")[2]}'


def fewer(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  count: int,
  usage: Mapping[str, Usage],
  *,
  how: str = MERGE,
) -> tuple[models.ModelFamily, typing.Tree]:
  """The model with the most used experts of every sparse layer.

  Args:
    model: sparse, of the family 't5x' or 'lm'.
    params: its parameters.
    count: experts that are left in each layer.
    usage: from `measure`.
    how: 'prune' forgets the others. 'merge' averages each into the one that is
      left and whose kernels are nearest, by their loads, hidden units matched
      first. Routers keep the columns of those that are left.

  Returns:
    `(family, parameters)`, on the host.

  Raises:
    ConfigError: more experts than there are, fewer than a token chooses where
      that is fixed, or an unknown `how`.
    StructureError: a layer whose usage is not given, or parameters of another
      model.
  """
  family = sparse_layers.family_of(model, sparse=True)
  experts = family.config.moe.num_experts
  target = with_experts(family, count)
  if how not in HOW:
    raise errors.ConfigError(errors.near(how, HOW, 'how'))
  leaves = sparse_layers.of_sparse(family, params)
  found = dict(leaves)
  for layer, names in sparse_layers.layers(leaves).items():
    load = of_layer(usage, layer, experts).load
    kept = np.sort(np.argsort(-load, kind='stable')[:count])
    blocks = [expert(leaves, layer, names, e) for e in range(experts)]
    if how == PRUNE:
      new = [blocks[e] for e in kept]
    else:
      new = _merged(blocks, kept, load)
    for name in names:
      found[sparse_layers.kernel(layer, name)] = np.stack(
        [block[name] for block in new]
      )
    router = f'{layer}/{sparse_layers.ROUTER}'
    found[router] = leaves[router][:, kept]
  return target, sparse_layers.stacked(target, found)


def with_experts(family: models.ModelFamily, count: int) -> models.ModelFamily:
  """The sparse family with fewer experts in every layer.

  Raises:
    ConfigError: see `fewer`.
  """
  config = family.config.moe
  errors.check_whole('The number of experts that are left', count)
  if count > config.num_experts:
    raise errors.ConfigError(
      f'{count} experts cannot be left of {config.num_experts} in every layer.'
    )
  smaller = dataclasses.replace(
    config, num_experts=count, top_k=min(config.top_k, count)
  )
  return sparse_layers.with_moe(family, smaller)


def of_layer(usage: Mapping[str, Usage], layer: str, experts: int) -> Usage:
  """The usage of a layer.

  Raises:
    StructureError: it is not given, or of another number of experts.
  """
  if layer not in usage:
    raise errors.StructureError(
      errors.near(layer, usage, 'sparse layer of the usage given,')
    )
  if len(usage[layer].load) != experts:
    raise errors.StructureError(
      f'The usage of {layer} is of {len(usage[layer].load)} experts, but the '
      f'model has {experts}.'
    )
  return usage[layer]


def expert(leaves, layer, names, number) -> dict[str, np.ndarray]:
  """`{name: kernel}` of one expert of a layer."""
  return {n: leaves[sparse_layers.kernel(layer, n)][number] for n in names}


def _merged(blocks, kept, load):
  """Those that are left, each averaged with those nearest to it."""
  members = {int(e): [int(e)] for e in kept}
  for e in range(len(blocks)):
    if e not in members:
      nearest = min(
        members, key=lambda k: _distance(blocks[e], blocks[k])
      )  # fmt: skip
      members[nearest].append(e)
  found = []
  for own, others in members.items():
    lined_up = [aligned(blocks[own], blocks[e]) for e in others]
    # An expert that is never used counts little, but all of them may not be.
    weights = load[others] + 1e-12
    found.append({
      n: upcycle.mean([block[n] for block in lined_up], weights)
      for n in blocks[own]
    })  # fmt: skip
  return found


def _distance(block, other):
  """Squared distance, hidden units matched."""
  block = aligned(other, block)
  return sum(
    float(np.sum((block[n] - other[n]).astype(np.float64) ** 2)) for n in block
  )


def aligned(
  reference: Mapping[str, np.ndarray], block: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """An expert's hidden units in the order that fits another one best.

  The function of the block stays the same; `sum of <unit of reference, unit>`
  over the kernels is largest.

  Args:
    reference: `{name: kernel}`, `[in, hidden]`, of `wo` `[hidden, out]`.
    block: the same of the other one.

  Source: Ainsworth et al. (2022), https://arxiv.org/abs/2209.04836, section 3.2.
  """
  units = lambda kernels: np.concatenate(
    [k.T if not sparse_layers.is_output(n) else k for n, k in kernels.items()],
    axis=1,
  ).astype(np.float64)
  similarity = units(reference) @ units({n: block[n] for n in reference}).T
  _, order = optimize.linear_sum_assignment(similarity, maximize=True)
  return {
    n: k[order] if sparse_layers.is_output(n) else k[:, order]
    for n, k in block.items()
  }


def matched(
  model: nn.Module | models.ModelFamily,
  reference: typing.Tree,
  params: typing.Tree,
) -> typing.Tree:
  """A sparse model with its experts in the order of another one's.

  Its function stays the same, and merges of the two join experts that are
  alike: in every layer experts are assigned so that their kernels, hidden units
  matched, are nearest.

  Args:
    model: sparse, of the family 't5x' or 'lm'.
    reference: parameters whose order is taken.
    params: those that are put in order.

  Returns:
    Parameters, on the host.

  Raises:
    ConfigError: a model without experts.
    StructureError: parameters of another model.
  """
  family = sparse_layers.family_of(model, sparse=True)
  wanted = sparse_layers.of_sparse(family, reference)
  leaves = sparse_layers.of_sparse(family, params)
  found = dict(leaves)
  experts = range(family.config.moe.num_experts)
  for layer, names in sparse_layers.layers(leaves).items():
    theirs = [expert(wanted, layer, names, e) for e in experts]
    ours = [expert(leaves, layer, names, e) for e in experts]
    cost = np.array([[_distance(b, a) for b in ours] for a in theirs])
    _, order = optimize.linear_sum_assignment(cost)
    blocks = [aligned(theirs[i], ours[e]) for i, e in enumerate(order)]
    for name in names:
      found[sparse_layers.kernel(layer, name)] = np.stack(
        [block[name] for block in blocks]
      )
    router = f'{layer}/{sparse_layers.ROUTER}'
    found[router] = leaves[router][:, order]
  return sparse_layers.stacked(family, found)
