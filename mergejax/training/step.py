# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One step of training: gradient, optimizer, and what is done besides."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import frozen
from mergejax.training import microbatches
from mergejax.training import objective as objective_lib
from mergejax.training import state as state_lib
from mergejax.training import transforms as transforms_lib

Batch = Mapping[str, Any]


class Step(NamedTuple):
  """A step as a pure pair, as an optax transformation is; the caller compiles.

  Attributes:
    init: `(params, key) -> TrainState`: step 0, no moments; `key` is from
      `jax.random.key`.
    update: `(state, batch) -> (state, metrics)`.
  """

  init: Callable[[typing.Tree, jax.Array], state_lib.TrainState]
  update: Callable[
    [state_lib.TrainState, Batch],
    tuple[state_lib.TrainState, dict[str, jax.Array]],
  ]


def make_step(
  model: nn.Module | models.ModelFamily,
  optimizer: optax.GradientTransformation,
  *,
  objective: objective_lib.Objective | None = None,
  transforms: Sequence[transforms_lib.StepTransform] = (),
  freeze: Sequence[str] = (),
  accumulate: int = 1,
  clip: float | None = None,
) -> Step:
  """The training step of a model.

  Args:
    model: a module that a family knows, or a family.
    optimizer: an optax transformation.
    objective: what is minimised; `cross_entropy()` by default.
    transforms: what is done after the update, in order, but averages of the
      parameters last: they see what is kept.
    freeze: regular expressions over whole paths of parameters that stay as
      they are; these have no gradient and no state of the optimizer.
    accumulate: in how many parts a batch is worked through, one after the
      other, to save memory: the gradient is that of the whole batch.
    clip: largest global norm of the gradient; it is scaled down to it.

  Returns:
    A `Step`. To the metrics of the objective it adds `grad_norm`, before
    clipping. A batch without a token (the metric `tokens` is 0) moves the step
    number alone: no moment decays, no weight either. Random numbers depend on
    the run's key and the step alone. Everything inside is of one model: under
    `vmap` over experts, norms, clipping and normalisers stay those of each
    expert.

  Raises:
    ConfigError: two transforms of one name, or numbers that are none.

  Example:
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> step = make_step(module, optax.sgd(0.1))
    >>> family = models.family_of(module)
    >>> state = step.init(family.init(jax.random.key(0)), jax.random.key(1))
    >>> state, metrics = jax.jit(step.update)(state, family.example_batch(2))
    >>> int(state.step), sorted(metrics)[:2]
    (1, ['accuracy', 'grad_norm'])
  """
  family = models.family_of(model)
  objective = objective or objective_lib.cross_entropy()
  _check(transforms, accumulate, clip)
  transforms = sorted(transforms, key=lambda each: each.averaged is not None)

  def init(params, key):
    learned, _ = frozen.split(params, frozen.paths(family, params, freeze))
    return state_lib.TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(learned),
      key=jax.random.key_data(key),
      extras={each.name: each.init(params) for each in transforms},
    )

  def update(state, batch):
    rngs = {}
    if family.rng_streams(train=True):
      key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
      rngs = objective_lib.rng_streams(family, key)
    fixed = frozen.paths(family, state.params, freeze)
    learned, rest = frozen.split(state.params, fixed)
    grads, metrics, changed = microbatches.gradient(
      family, objective, learned, rest, batch, rngs, accumulate
    )
    metrics['grad_norm'] = optax.tree.norm(grads)
    if clip is not None:
      grads = _clipped(grads, metrics['grad_norm'], clip)
    updates, opt_state = optimizer.update(grads, state.opt_state, learned)
    params = frozen.join(optax.apply_updates(learned, updates), rest)
    # Running statistics are measured, not learned, and stay where told to.
    params = frozen.kept(family.updated(params, changed), state.params, freeze)
    new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    if 'tokens' in metrics:
      new = state_lib.where(metrics['tokens'] > 0, new, state)
    extras = {}
    for each in transforms:
      extras[each.name], new, metrics = each.update(
        state.extras[each.name], state, new, metrics
      )
    return new.replace(extras=extras), metrics

  return Step(init, update)


def _clipped(grads, norm, limit):
  """The gradient, scaled down to a global norm of at most `limit`."""
  scale = jnp.where(norm > limit, limit / norm, 1.0)
  return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _check(transforms, accumulate, clip):
  names = [each.name for each in transforms]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise errors.ConfigError(
      f'Two step transforms are called {twice[0]!r}: give one of them another '
      'name=.'
    )
  errors.check_whole('accumulate', accumulate)
  if clip is not None and not clip > 0:
    raise errors.ConfigError(f'clip must be a positive number, not {clip!r}.')
