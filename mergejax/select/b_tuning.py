# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""B-Tuning: fine-tuning one model towards the evidence of several."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing
from mergejax.methods import base as merge_base
from mergejax.training import losses
from mergejax.training import objective as objective_lib


def teacher_weights(
  scores: Sequence[float], temperature: float = 0.1
) -> jax.Array:
  """`softmax(LogME / temperature)` over teachers, <float>[K].

  Example:
    >>> teacher_weights([1.0, 1.0]).tolist()
    [0.5, 0.5]
  """
  merge_base.check_option(
    'temperature', temperature, lambda v: v > 0, 'above 0'
  )
  _check_finite('score', scores)
  return jax.nn.softmax(jnp.asarray(scores) / temperature)


def _check_finite(what, values):
  """Refuses undefined numbers, where they can be seen."""
  for i, value in enumerate(values):
    if numerics.is_traced(value):
      continue
    if not np.isfinite(np.asarray(value)).all():
      raise errors.DataError(f'The {what} of teacher {i} is not finite.')


def loss(
  student_features: typing.Array,
  student_means: typing.Array,
  teacher_features: Sequence[typing.Array],
  teacher_means: Sequence[typing.Array],
  weights: typing.Array,
  real: typing.Array | None = None,
) -> jax.Array:
  """`mean (F_s m_s^T - sum_k pi_k F_k m_k^T)^2` over batch and classes.

  No gradient reaches the teachers, nor any posterior mean.

  Args:
    student_features: <float>[batch, D].
    student_means: <float>[C, D], posterior means of LogME for the student on
      the target task, from before training.
    teacher_features: <float>[batch, D_k] each.
    teacher_means: <float>[C, D_k] each.
    weights: <float>[K] from `teacher_weights`.
    real: <bool>[batch], False for rows that fill a batch; they have no part in
      the mean. All count by default.

  Returns:
    <float>[]. As the mean is over classes too, lambda 100 is 100 / C for each
    example.

  Raises:
    UserError: features and means that do not fit each other.

  Source: You et al. (2022), https://arxiv.org/abs/2110.10545, section 6.
  """
  pairs = [(student_features, student_means), *zip(teacher_features, teacher_means)]  # fmt: skip
  counts = {len(teacher_features), len(teacher_means), len(weights)}
  if len(counts) > 1 or not teacher_features:
    raise errors.DataError(
      f'{len(teacher_features)} features, {len(teacher_means)} means and '
      f'{len(weights)} weights of teachers: one of each, and at least one '
      'teacher.'
    )
  for i, (features, means) in enumerate(pairs):
    who = f'teacher {i - 1}' if i else 'the student'
    if means is None:
      raise errors.DataError(
        f'The posterior means of {who} are missing: `select.evidence(features, '
        'labels).means`.'
      )
    if features.shape[-1] != means.shape[-1] or means.shape[0] != pairs[0][1].shape[0]:  # fmt: skip
      raise errors.DataError(
        f'Features {list(features.shape)} and means {list(means.shape)} of '
        f'{who} do not fit: [batch, D] and [classes, D].'
      )
    if features.shape[0] != student_features.shape[0]:
      raise errors.DataError(
        f'{who} has features of {features.shape[0]} examples, the student of '
        f'{student_features.shape[0]}: they must be those of one batch.'
      )
  still = jax.lax.stop_gradient
  target = student_features @ still(student_means).T
  source = sum(
    weights[k] * (still(features) @ still(means).T)
    for k, (features, means) in enumerate(pairs[1:])
  )
  apart = jnp.square(target - still(source))
  if real is None:
    return jnp.mean(apart)
  rows = jnp.asarray(real).astype(apart.dtype)[:, None]
  return losses.weighted_mean(apart, jnp.broadcast_to(rows, apart.shape))


def with_teachers(
  objective: objective_lib.Objective,
  features: Callable[[typing.Tree, Any], jax.Array],
  means: typing.Array,
  teachers: Sequence[tuple[Callable[[Any], jax.Array], typing.Array]],
  scores: Sequence[float],
  *,
  trade_off: float = 100.0,
  temperature: float = 0.1,
) -> objective_lib.Objective:
  """An objective with the B-Tuning term added, for a `training.Trainer`.

  Rows of a batch that have no weight in the loss have none in the term.

  Args:
    objective: the task's, such as `training.cross_entropy()`.
    features: `(params, batch) -> <float>[batch, D]` of the student; see
      `select.features`.
    means: <float>[C, D] of the student.
    teachers: `(features of a batch, means)` of each teacher; the former may
      read a cache.
    scores: LogME of each teacher.
    trade_off: lambda; 100 in the paper.
    temperature: of the teachers' weights; 0.1 in the paper.

  Returns:
    An objective with the further metric `b_tuning`.
  """
  weights = teacher_weights(scores, temperature)
  _check_finite('matrix of means', [m for _, m in teachers])

  def combined(family, params, batch, rngs):
    value, outputs = objective(family, params, batch, rngs)
    rows = outputs.weights.reshape(len(outputs.weights), -1)
    extra = loss(
      features(params, batch), means, [f(batch) for f, _ in teachers],
      [m for _, m in teachers], weights, jnp.any(rows > 0, axis=1),
    )  # fmt: skip
    metrics = {**outputs.metrics, 'b_tuning': extra}
    return value + trade_off * extra, outputs._replace(metrics=metrics)

  return combined
