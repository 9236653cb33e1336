# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Running statistics of batch norms: rows that only fill a batch do not count."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing

COLLECTION = 'batch_stats'


def call(
  module: nn.Module,
  variables: Mapping[str, typing.Tree],
  positional: list[typing.Array],
  named: Mapping[str, Any],
  weights: typing.Array | None,
  **settings: Any,
) -> tuple[jax.Array, Mapping[str, typing.Tree]]:
  """`module.apply` in training mode, with rows of weight 0 left out of norms.

  A batch of nothing but such rows leaves the running statistics as they were.

  Args:
    module: with batch norms.
    variables: flax's collections, `batch_stats` among them.
    positional: arguments of the call.
    named: arguments of the call, by name.
    weights: `<float>[batch]`, or None: every row counts.
    **settings: `rngs` and `mutable` of `apply`; `batch_stats` is mutable.

  Returns:
    `(logits, the collections that changed)`.

  Raises:
    StructureError: a batch norm whose first axis is not that of the batch,
      where some rows have no weight.
  """
  if weights is None:
    return module.apply(variables, *positional, **named, **settings)
  real = jnp.asarray(weights) > 0
  with nn.intercept_methods(_norms_of(real)):
    logits, changed = module.apply(variables, *positional, **named, **settings)
  keep = lambda new, old: jnp.where(jnp.any(real), new, old)
  stats = jax.tree.map(keep, changed[COLLECTION], variables[COLLECTION])
  return logits, {**changed, COLLECTION: stats}


def _norms_of(real: jax.Array) -> Callable[..., Any]:
  """An interceptor that shows batch norms the real rows, `<bool>[batch]`."""

  def interceptor(call, positional, named, context):
    if (
      not isinstance(context.module, nn.BatchNorm)
      or context.method_name != '__call__'
      or named.get('mask') is not None
    ):
      return call(*positional, **named)
    inputs = positional[0] if positional else named['x']
    if len(inputs) != len(real):
      raise errors.StructureError(
        f'The batch norm {"/".join(context.module.path)} sees {len(inputs)} '
        f'rows, the batch has {len(real)}, some of no weight: which of them it '
        'must leave out is not known. Give it its `mask`, or whole batches '
        'without weights.'
      )
    # The mean of no row is NaN: where none is real, all are taken.
    mask = (real | ~jnp.any(real)).reshape(-1, *(1,) * (inputs.ndim - 1))
    return call(*positional, **named, mask=mask)

  return interceptor
