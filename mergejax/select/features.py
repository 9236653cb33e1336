# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Features of a model on a task: what its last layer is given."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.intercept import capture


def extract(
  module: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
  *,
  layer: str | None = None,
) -> np.ndarray:
  """Features of examples, by interception of what a linear map is given.

  By default those that its family says. Image classifiers: the input of the
  head. Language models: that of the output layer, averaged over real positions.
  Encoder-decoders: the encoder's output (the input of the first
  cross-attention), averaged over real positions.

  Args:
    module: the model: its family, or a module that one knows.
    params: its parameters.
    batches: dicts of arrays; rows without any real target are left out.
    layer: path of another kernel whose inputs are the features; of layers that
      are stacked in one, the first.

  Returns:
    <float32>[examples, width].

  Raises:
    UserError: a layer that does not exist or was not seen, no example.

  Example:
    >>> from mergejax.nn import vision
    >>> module = vision.MLP(vision.MLPConfig(hidden=(4,)))
    >>> family = models.family_of(module)
    >>> params = family.init(jax.random.key(0))
    >>> extract(family, params, [family.example_batch(3)]).shape
    (3, 4)
  """
  specs = tree_lib.specs(params)
  layer = layer or models.family_of(module).features_layer(specs)
  if layer not in specs:
    raise errors.ConfigError(errors.near(str(layer), specs, 'parameter'))

  @jax.jit
  def pooled(params, batch):
    return features_of(module, params, batch, layer)

  rows = []
  for batch in batches:
    real = np.asarray(models.family_for(module, batch).real_rows(batch))
    rows.append(np.asarray(pooled(params, dict(batch)))[real])
  if not rows:
    raise errors.DataError('There was no batch to take features of.')
  return np.concatenate(rows)


def features_of(
  module: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  layer: str,
) -> jax.Array:
  """Features of one batch, <float32>[batch, width]; differentiable."""
  mask = models.family_for(module, batch).mask(layer, batch)
  if isinstance(mask, str):
    raise errors.ConfigError(
      f'{layer} is given slots of experts, not the rows of a batch: choose '
      'another layer for features.'
    )

  def pool(path, inputs):
    wide = inputs.astype(jnp.float32)
    if wide.ndim == 2:
      return wide
    wide = wide.reshape(wide.shape[0], -1, wide.shape[-1])
    if mask is None or mask.ndim == 1:
      return jnp.mean(wide, axis=1)
    real = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(jnp.where(real > 0, wide, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(real, axis=1), 1.0)

  found = capture.inputs_of(
    module, params, batch, pool, wanted=lambda path: path == layer
  )
  if layer not in found:
    raise errors.ConfigError(
      f'{layer} was not seen at work; name another kernel with `layer`.'
    )
  # Stacked layers have their stack in front: features are those of the first.
  wide = found[layer]
  return wide.reshape(-1, *wide.shape[-2:])[0]
