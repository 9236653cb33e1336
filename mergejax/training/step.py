# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The training state and one step of it."""

from collections.abc import Callable
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax import models
from mergejax.core import typing
from mergejax.training import losses


@flax.struct.dataclass
class TrainState:
  """All that a run must keep to continue.

  Attributes:
    step: `<int32>[]` updates made so far.
    params: the parameters.
    opt_state: the optimizer's state.
    key: the random key of the run; a step folds its number into it.
  """

  step: jax.Array
  params: typing.Tree
  opt_state: Any
  key: jax.Array


def create(
  params: typing.Tree,
  optimizer: optax.GradientTransformation,
  key: jax.Array,
) -> TrainState:
  """A fresh state: step 0, no moments. `key` is from `jax.random.key`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=jax.random.key_data(key),
  )


def step_number(state: TrainState) -> int:
  """Updates made so far; experts trained side by side have made the same."""
  step = state.step
  if isinstance(step, jax.Array):  # maybe spread over processes
    step = step.addressable_shards[0].data
  return int(np.asarray(step).reshape(-1)[0])


StepFn = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
  loss_fn: losses.LossFn,
  optimizer: optax.GradientTransformation,
  *,
  dropout: bool = False,
) -> StepFn:
  """One update: gradient, optimizer, metrics. Pure; the caller compiles it.

  Args:
    loss_fn: from `losses.make_loss`.
    optimizer: an optax transformation.
    dropout: hand the loss a key; keys depend on the run's key and the step
      alone.

  Returns:
    `step(state, batch) -> (state, metrics)`. To the metrics of the loss it adds
    `grad_norm`. A batch without a token (the metric `tokens` is 0) moves the
    step number alone: no moment decays, no weight either. Everything inside is
    of one model: under `vmap` over experts, norms, clipping and normalisers
    stay those of each expert.
  """

  def step(state, batch):
    key = None
    if dropout:
      key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, batch, key
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = dict(metrics, grad_norm=optax.tree.norm(grads))
    if models.BATCH_STATS in metrics:
      # Running statistics are measured, not learned.
      params = {**params, models.BATCH_STATS: metrics.pop(models.BATCH_STATS)}
    if 'tokens' in metrics:
      keep = functools.partial(jnp.where, metrics['tokens'] > 0)
      params = jax.tree.map(keep, params, state.params)
      opt_state = jax.tree.map(keep, opt_state, state.opt_state)
    state = state.replace(
      step=state.step + 1, params=params, opt_state=opt_state
    )
    return state, metrics

  return step
