# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A stack of equal layers: one by one or scanned, with or without remat.

Scanned, the layers are one: a parameter has an axis more, and the compiler is
given one layer whatever their number, so compiling takes as long for 96 as for
2. The stack is called like its parent (`encoder/encoder/mlp/wi/kernel`), as in
T5X's `examples/scalable_t5`; one by one they are `encoder/layers_3/...`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from mergejax.core import errors
from mergejax.core import typing

# What a backward pass finds kept rather than computes anew. Of JAX's, by their
# names, those that are policies; others make one, of arguments.
_POLICIES: dict[str, Callable[..., bool] | None] = {
  'full': None,
  'minimal': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  **{
    name: getattr(jax.checkpoint_policies, name)
    for name in (
      'everything_saveable', 'nothing_saveable', 'dots_saveable',
      'checkpoint_dots', 'dots_with_no_batch_dims_saveable',
      'checkpoint_dots_with_no_batch_dims',
    )
  },
}  # fmt: skip


def apply(
  layer: Callable[..., nn.Module],
  count: int,
  name: str,
  x: typing.Array,
  *args: typing.Array | None,
  each: Sequence[Mapping[str, Any]] | None = None,
  scan_axis: int | None = None,
  remat: str = 'none',
) -> typing.Array:
  """`layer_count(... layer_1(x, *args) ..., *args)`, inside a compact module.

  Args:
    layer: makes one of the layers, given its `name`; all must have parameters
      of the same names and shapes.
    count: how many.
    name: of the stack where it is scanned; else they are `layers_0`, ...
    x: `<float>[batch, length, embed]`, which a layer gives back so.
    *args: what every layer is given besides.
    each: further settings of every layer, by which it is made; scanned layers
      must all have the same.
    scan_axis: where a scanned parameter has its axis of layers; None does not
      scan. Caches, and what is watched in a layer (`intermediates`), have it in
      front.
    remat: 'none' keeps what the backward pass needs; 'full' keeps each layer's
      input alone and computes the rest anew, for one more forward pass;
      'minimal' also keeps products with kernels. Or a policy of
      `jax.checkpoint_policies` by its name. Parameters that are gathered for a
      layer are let go after it under every policy.

  Returns:
    `<float>[batch, length, embed]`.

  Raises:
    ConfigError: `remat` is no policy; scanned layers that differ.

  Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016),
  https://arxiv.org/abs/1604.06174.
  """
  each = each or [{}] * count
  body = lambda module, x, *args: module(x, *args)
  if remat != 'none':
    body = nn.remat(body, prevent_cse=scan_axis is None, policy=_policy(remat))
  if scan_axis is None:
    for i in range(count):
      x = body(layer(name=f'layers_{i}', **each[i]), x, *args)
    return x
  if any(own != each[0] for own in each):
    raise errors.ConfigError(
      f'The layers of the {name} differ, and a scan makes all of them from one: '
      'set scan_layers=False, or, of a model with experts, make all of its '
      'layers sparse or none.'
    )
  scanned = nn.scan(
    lambda module, x, *args: (body(module, x, *args), None),
    variable_axes={
      'params': scan_axis, 'cache': 0, 'encoded': 0, 'intermediates': 0,
    },
    split_rngs={'params': True, 'dropout': True},
    in_axes=nn.broadcast,
    length=count,
  )  # fmt: skip
  return scanned(layer(name=name, **each[0]), x, *args)[0]


def _policy(name: str) -> Callable[..., bool] | None:
  if name not in _POLICIES:
    raise errors.ConfigError(
      errors.near(name, ['none', *_POLICIES], 'remat policy')
    )
  return _POLICIES[name]
