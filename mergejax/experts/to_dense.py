# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense models from sparse ones: the experts of every layer become one block."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import sparse_layers
from mergejax.experts import upcycle
from mergejax.experts import usage as usage_lib
from mergejax.nn import moe_config

MEAN, LOAD, ARGMAX, FRESH = 'mean', 'load', 'argmax', 'fresh'
HOW = (MEAN, LOAD, ARGMAX, FRESH)
# These must know how much experts are used.
BY_USAGE = (LOAD, ARGMAX)


def to_dense(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  *,
  how: str = MEAN,
  usage: Mapping[str, usage_lib.Usage] | None = None,
  align: bool = False,
  key: jax.Array | None = None,
) -> tuple[models.ModelFamily, typing.Tree]:
  """Makes one feed-forward block of the experts of every sparse layer.

  Args:
    model: sparse, of the family 't5x' or 'lm'.
    params: its parameters.
    how: 'mean' averages the experts, which takes `upcycle` back bit for bit;
      'load' weighs them by their loads; 'argmax' keeps the most used one.
      'fresh' draws the block anew: what a student of Switch begins as, see
      `training.distillation`.
    usage: from `usage.measure`; 'load' and 'argmax' need it. Where it is given
      and weights do not sum to 1, as in Switch, `wo` is multiplied by the mean
      weight of a token's experts: the block is to give what the layer gave.
    align: experts that were not born from one parent: their hidden units are
      matched to those of the most used one (the first, without `usage`) before
      they are averaged.
    key: of fresh blocks; `key(0)` by default.

  Returns:
    `(family, parameters)` of the dense model, on the host, as a first point for
    distillation.

  Raises:
    ConfigError: a model without experts, with an extra dense block behind them,
      an unknown `how`, one that needs `usage`, or fresh blocks with what is of
      experts.
    StructureError: a layer whose usage is not given, or parameters of another
      model.

  Source: averaging as the inverse of Komatsuzaki et al. (2022),
  https://arxiv.org/abs/2212.05055.
  """
  family = sparse_layers.family_of(model, sparse=True)
  config = family.config.moe
  if how not in HOW:
    raise errors.ConfigError(errors.near(how, HOW, 'how'))
  if how in BY_USAGE and usage is None:
    raise errors.ConfigError(
      f'how={how!r} must know how much experts are used: give usage= of '
      'experts.usage.measure.'
    )
  if how == FRESH and (align or usage is not None):
    raise errors.ConfigError(
      'Fresh blocks have nothing of the experts: leave out align, and their '
      f'usage, or take how={MEAN!r}.'
    )
  if config.extra_mlp:
    raise errors.ConfigError(
      'A dense model has no place for the extra block behind every sparse layer '
      '(extra_mlp=True).'
    )
  leaves = sparse_layers.of_sparse(family, params)
  found = {
    path: leaf
    for path, leaf in leaves.items()
    if not path.endswith(sparse_layers.ROUTER)
    and not sparse_layers.KERNEL.fullmatch(path)
  }
  dense = sparse_layers.with_moe(family, None)
  if how == FRESH:
    return dense, sparse_layers.stacked(dense, {**_drawn(dense, key), **found})
  for layer, names in sparse_layers.layers(leaves).items():
    own = None
    if usage is not None:
      own = usage_lib.of_layer(usage, layer, config.num_experts)
    blocks = [
      usage_lib.expert(leaves, layer, names, e)
      for e in range(config.num_experts)
    ]
    block = _one(blocks, how, own, align)
    if own is not None:
      scale = _scale(config, layer, own)
      block = {
        n: (k * np.float32(scale) if sparse_layers.is_output(n) else k)
        for n, k in block.items()
      }
    found |= {f'{layer}/{n}/kernel': kernel for n, kernel in block.items()}
  return dense, sparse_layers.stacked(dense, found)


def _drawn(dense, key):
  """`{path: array}` of fresh parameters, layers one by one."""
  alone = sparse_layers.one_by_one(dense)
  made = alone.init(jax.random.key(0) if key is None else key)
  return sparse_layers.unstacked(alone, made)


def _one(blocks, how, usage, align):
  """The block that stands for all."""
  first = 0 if usage is None else int(np.argmax(usage.load))
  if how == ARGMAX:
    return blocks[first]
  if align:
    blocks = [usage_lib.aligned(blocks[first], block) for block in blocks]
  weights = None if usage is None or how == MEAN else usage.load
  return {
    n: upcycle.mean([block[n] for block in blocks], weights) for n in blocks[0]
  }


def _scale(config, layer, usage):
  """The mean weight of all experts of a token together."""
  decoder = layer.startswith('decoder')
  if config.sums_to_one(decoder):
    return 1.0
  chosen = config.router_of(decoder) == moe_config.TOKENS_CHOOSE
  return usage.gate * (config.top_k if chosen else usage.experts)
