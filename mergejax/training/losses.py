# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Cross entropy as T5X defines it: label smoothing, z-loss, normalisation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing

NORMALIZERS = (
  'NUM_REAL_TARGET_TOKENS',
  'NUM_TOTAL_TARGET_TOKENS',
  'AVERAGE_PER_SEQUENCE',
)


def token_cross_entropy(
  logits: typing.Array,
  targets: typing.Array,
  *,
  z_loss: float = 0.0,
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of every position, and its z-loss part.

  With smoothing `s`, confidence `c = 1 - s` and off value `o = s / (V - 1)`:
  `-sum_v t_v log p_v + z_loss * (logsumexp z)^2 - const`, where `const`
  makes a perfect prediction cost 0.

  Args:
    logits: `<float>[..., vocab]`; computed in float32.
    targets: `<int32>[...]`.
    z_loss: coefficient that keeps the log normaliser near 0; T5 trains with
      1e-4.
    label_smoothing: probability spread over the wrong tokens, in [0, 1].

  Returns:
    `(loss, z part)`, each `<float32>[...]`; the z part is included in the
    loss. Where the target is not in the vocabulary the loss is NaN.

  Raises:
    UserError: a smoothing that is no probability, or has no token to go to.

  Source: T5X `losses.py`; Szegedy et al. (2016) for smoothing.
  """
  logits = logits.astype(jnp.float32)
  vocab = logits.shape[-1]
  if not 0 <= label_smoothing <= 1:
    raise errors.ConfigError(
      'label_smoothing is a probability between 0 and 1, not '
      f'{label_smoothing}.'
    )
  if label_smoothing and vocab == 1:
    raise errors.ConfigError(
      f'label_smoothing={label_smoothing} has no other token to go to: the '
      'vocabulary has only one.'
    )
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A masked sum instead of a gather: it fuses, shards over the vocabulary, and
  # its gradient is not a scatter.
  is_target = (
    jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    == targets[..., None]
  )
  target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  confidence = 1.0 - label_smoothing
  loss = log_z - target_logit
  if label_smoothing:
    off = label_smoothing / (vocab - 1)
    others = jnp.sum(logits, axis=-1) - target_logit
    cross = confidence * target_logit + off * others
    constant = -(vocab - 1) * off * np.log(off + 1e-20)
    if confidence > 0:  # 0 log 0 is 0
      constant -= confidence * np.log(confidence)
    loss = log_z - cross - constant
  # A row of zeros would pass for a target that the vocabulary does not have.
  loss = jnp.where((targets >= 0) & (targets < vocab), loss, jnp.nan)
  z_part = z_loss * jnp.square(log_z)
  return loss + z_part, z_part


def normalizer(
  kind: str | float | None,
  targets: typing.Array,
  weights: typing.Array,
  segments: typing.Array | None = None,
) -> tuple[jax.Array | float, jax.Array]:
  """The factor that a summed loss is divided by, and the weights to sum with.

  Args:
    kind: None (no division), a positive number, or a name of `NORMALIZERS`.
    targets: `<int32>[batch, length]`.
    weights: `<float32>[batch, length]` loss weights.
    segments: `<int32>[batch, length]` of packed rows, for
      `AVERAGE_PER_SEQUENCE`.

  Returns:
    `(factor, weights)`.

  Raises:
    UserError: an unknown name, or a number that nothing can be divided by.
  """
  if kind is None:
    return 1.0, weights
  if not isinstance(kind, str):
    if not 0 < kind < np.inf:
      raise errors.ConfigError(
        f'The loss normalizing factor must be a positive number, not {kind}.'
      )
    return float(kind), weights
  if kind == 'NUM_REAL_TARGET_TOKENS':
    return jnp.sum(weights), weights
  if kind == 'NUM_TOTAL_TARGET_TOKENS':
    return float(np.prod(targets.shape)), weights
  if kind == 'AVERAGE_PER_SEQUENCE':
    if segments is None:
      per_sequence = jnp.sum(weights, axis=-1, keepdims=True)
    else:
      same = segments[:, :, None] == segments[:, None, :]
      per_sequence = jnp.einsum('bqk,bk->bq', same.astype(jnp.float32), weights)
    weights = jnp.where(
      per_sequence > 0, weights / jnp.maximum(per_sequence, 1e-20), 0.0
    )
    return jnp.sum(weights), weights
  raise errors.ConfigError(
    errors.near(kind, NORMALIZERS, 'loss normalizing factor')
  )


def weighted_sum(values: typing.Array, weights: typing.Array) -> jax.Array:
  """`sum w v`; what has no weight has no part, be it NaN."""
  return jnp.sum(jnp.where(weights != 0, values, 0.0) * weights)


def weighted_mean(values: typing.Array, weights: typing.Array) -> jax.Array:
  """`sum w v / sum w`; values of weight 0 do not count, be they NaN.

  Args:
    values: `<float32>[...]`.
    weights: `<float32>[...]` of the same shape, none negative.

  Returns:
    `<float32>[]`. Nothing over nothing is 0, with a gradient of 0: a step on a
    batch of padding alone changes nothing.

  Example:
    >>> float(weighted_mean(jnp.array([3.0, jnp.nan]), jnp.array([0.5, 0.0])))
    3.0
  """
  total = jnp.sum(weights)
  return weighted_sum(values, weights) / jnp.where(total > 0, total, 1.0)


def token_log_likelihood(
  module: nn.Module, params: typing.Tree, batch: dict[str, Any]
) -> jax.Array:
  """`log p(target)` of every position, `<float32>[batch, length]`, in nats."""
  family = models.family_of(module)
  outputs = family.apply(family.variables(params), batch)
  loss, _ = token_cross_entropy(outputs.logits, outputs.targets)
  return -loss
