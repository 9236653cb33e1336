# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse models from dense ones: of one, or of several trained apart.

Sources: Komatsuzaki et al., "Sparse Upcycling" (2022),
https://arxiv.org/abs/2212.05055; Sukhbaatar et al., "Branch-Train-MiX" (2024),
https://arxiv.org/abs/2403.07816.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import sparse_layers
from mergejax.nn import moe as moe_lib
from mergejax.nn import moe_config


def upcycle(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  moe: moe_config.MoeConfig,
  *,
  key: jax.Array,
) -> tuple[models.ModelFamily, typing.Tree]:
  """Makes every expert of a sparse layer a copy of the dense block it was.

  With `normalize_gates` (or 'gshard'), and where nothing is dropped, the new
  model is the same function: weights that sum to 1 of equal experts. With raw
  gates its sparse layers give `p f(x)` for `f(x)`, and its loss jumps at first.
  Steps and schedule of the dense model go on; its optimizer's moments of copied
  blocks do not fit the new ones and begin anew.

  Args:
    model: dense, of the family 't5x' or 'lm'.
    params: its parameters.
    moe: of the new model. The paper suggests half of the layers, 32 experts,
      experts choosing with a factor of 2 in an encoder, top-2 in a decoder.
    key: for the routers, which are drawn from N(0, 0.02^2).

  Returns:
    `(family, parameters)` of the sparse model, on the host.

  Raises:
    ConfigError: a model that has experts already, or other layers.
    StructureError: a block that the dense model does not have, or of another
      shape, with its name.

  Example:
    >>> dense = models.build({'model_type': 'lm', 'emb_dim': 8, 'num_layers': 2})
    >>> params = models.family_of(dense).init(jax.random.key(0))
    >>> moe = moe_config.MoeConfig(num_experts=4, normalize_gates=True)
    >>> family, sparse = upcycle(dense, params, moe, key=jax.random.key(1))
    >>> sparse['decoder']['layers_1']['mlp']['expert']['wo']['kernel'].shape
    (4, 1024, 8)

  Source: Komatsuzaki et al. (2022), section 3.
  """
  return _sparse(model, [params] * moe.num_experts, moe, key)


def branch_train_mix(
  model: nn.Module | models.ModelFamily,
  experts: Sequence[typing.Tree],
  moe: moe_config.MoeConfig,
  *,
  key: jax.Array,
) -> tuple[models.ModelFamily, typing.Tree]:
  """Makes dense models the experts of one sparse model, to be trained on.

  The feed-forward block of model k becomes expert k; everything else, dense
  blocks among it, is averaged.

  Args:
    model: dense, of the family 't5x' or 'lm'.
    experts: parameters of each, branched from one seed.
    moe: of the new model; as many experts as there are models. The paper makes
      every layer sparse, with top-2 and weights that sum to 1.
    key: for the routers.

  Returns:
    `(family, parameters)` of the sparse model, on the host.

  Raises:
    ConfigError: another number of experts than models; see `upcycle`.
    StructureError: see `upcycle`.

  Source: Sukhbaatar et al. (2024), section 3.2.
  """
  if len(experts) != moe.num_experts:
    raise errors.ConfigError(
      f'{len(experts)} models cannot be {moe.num_experts} experts: set '
      f'num_experts={len(experts)}.'
    )
  return _sparse(model, experts, moe, key)


def _sparse(model, params_of, moe, key):
  dense = sparse_layers.family_of(model, sparse=False)
  family = sparse_layers.with_moe(dense, moe)
  # Copies of one model are read once.
  models_of = {id(each): each for each in params_of}
  read = {
    i: sparse_layers.unstacked(dense, each) for i, each in models_of.items()
  }
  sources = [read[id(each)] for each in params_of]
  wanted = sparse_layers.one_by_one(family).specs()
  found = {}
  for number, (path, spec) in enumerate(wanted.items()):
    match = sparse_layers.KERNEL.fullmatch(path)
    if match:
      source = f'{match["layer"]}/{match["name"]}/kernel'
      blocks = [_block(own, source, spec.shape[1:]) for own in sources]
      found[path] = np.stack(blocks)
    elif path.endswith(sparse_layers.ROUTER):
      drawn = jax.random.normal(jax.random.fold_in(key, number), spec.shape)
      found[path] = moe_lib.ROUTER_DEVIATION * np.asarray(drawn, np.float32)
    else:
      leaves = [_block(own, path, spec.shape) for own in sources]
      found[path] = mean(leaves)
  return family, sparse_layers.stacked(family, found)


def _block(leaves, path, shape):
  """A parameter of a dense model.

  Raises:
    StructureError: it is not there, or of another shape.
  """
  if path not in leaves:
    raise errors.StructureError(
      f'The dense model has no {path}, which the sparse one needs: its layers '
      f'are {", ".join(sorted({p.rpartition("/")[0] for p in leaves})[:4])}, ...'
    )
  if leaves[path].shape != tuple(shape):
    raise errors.StructureError(
      f'{path} of the dense model has the shape {list(leaves[path].shape)}, but '
      f'{list(shape)} is expected: the sparse model must have its sizes.'
    )
  return leaves[path]


def mean(
  leaves: Sequence[np.ndarray], weights: Sequence[float] | None = None
) -> np.ndarray:
  """The weighted mean, summed in float64: of equal leaves it is the leaf."""
  if all(leaf is leaves[0] for leaf in leaves):
    return leaves[0]
  if weights is None:
    weights = [1.0] * len(leaves)
  total = float(np.sum(weights))
  found = sum(
    weight * leaf.astype(np.float64) for weight, leaf in zip(weights, leaves)
  )
  return np.asarray(found / total).astype(leaves[0].dtype)
