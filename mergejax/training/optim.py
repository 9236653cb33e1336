# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers, through optax, with the settings of the papers."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from mergejax.core import axes as axes_lib
from mergejax.training import schedules
from mergejax.training import slices

LearningRate = float | schedules.Schedule | schedules.Spanning


class Optimizer(optax.GradientTransformationExtraArgs):
  """An optax transformation that knows what it was made of.

  Attributes:
    settings: plain data; two optimizers with the same do the same.
    of_model: `{path: logical axes} -> Optimizer`: the same one, told of the
      model's stacked parameters; None where it treats every number by itself.
  """

  settings: Mapping[str, Any]
  of_model: Callable[[axes_lib.Rules], 'Optimizer'] | None = None


def adafactor(
  learning_rate: LearningRate,
  *,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  momentum: float | None = None,
  clipping_threshold: float = 1.0,
  max_gradient_norm: float | None = None,
  min_dim_size_to_factor: int = 128,
  axes: axes_lib.Rules = (),
  steps: int | None = None,
) -> Optimizer:
  """Adafactor as T5 uses it: relative updates, factored second moments.

  The update of a parameter is scaled by its root mean square (at least 1e-3),
  so one learning rate serves embeddings of scale 1 and small kernels alike.
  Layers, experts or branches stacked in one array are scaled, clipped and
  factored each by themselves, as if they were not stacked.

  Args:
    learning_rate: relative step size; T5 pre-trains with `1/sqrt(max(t, 1e4))`
      and fine-tunes with 0.001.
    decay_rate: second moments decay by `1 - (t + 1)^-decay_rate`.
    step_offset: steps already made elsewhere, subtracted in that formula.
    momentum: off, as in T5.
    clipping_threshold: limit of an update's root mean square.
    max_gradient_norm: clip the global gradient norm first; off, as in T5.
    min_dim_size_to_factor: matrices whose sides are both at least this long
      are factored; T5X's 128.
    axes: `[(path, logical axes)]` of stacked parameters, as in `mj.merge`:
      `[('.*/layers/mlp/wi/kernel', ('layers', 'embed', 'mlp'))]`. Axes called
      `layers`, `expert`, `branch` (see `axes.STACKS`) stack. A `Trainer` tells
      those that the model's family knows. An optimizer does not see what is
      frozen: a rule for nothing else is refused.
    steps: length of the run, for a learning rate that spans it; jobs tell it.

  Returns:
    An optax transformation. Its `init` raises a `UserError` for a parameter of
    three axes or more if it is not known whether one of them stacks.

  Raises:
    UserError: a learning rate that spans a run of unknown length.

  Source: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235; T5X
  `adafactor.py`, whose factor rules take stacked axes as batch axes. (T5X
  factors stacked matrices whatever their size; here a stack is factored if its
  slices would be.)
  """
  settings = dict(locals())
  rate = schedules.over(learning_rate, steps)
  optimizer = optax.adafactor(
    rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    decay_rate=decay_rate,
    decay_offset=step_offset,
    multiply_by_parameter_scale=True,
    clipping_threshold=clipping_threshold,
    momentum=momentum,
  )

  def of_model(known: axes_lib.Rules) -> Optimizer:
    of_slices = slices.per_slice(
      optimizer, axes, known, one_model=max_gradient_norm is not None
    )
    return _made('adafactor', of_slices, max_gradient_norm, settings, rate)

  made = of_model(())
  made.of_model = of_model
  return made


def adamw(
  learning_rate: LearningRate,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-7,
  weight_decay: float = 0.1,
  max_gradient_norm: float | None = 0.1,
  steps: int | None = None,
) -> Optimizer:
  """AdamW with the settings of Branch-Train-Merge's released scripts.

  Args:
    learning_rate: peak 5e-4 there.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay, on every parameter.
    max_gradient_norm: clip the global gradient norm first; None for no clip.
    steps: length of the run, for a learning rate that spans it; jobs tell it.

  Raises:
    UserError: a learning rate that spans a run of unknown length.

  Source: Li et al., "Branch-Train-Merge" (2022),
  https://arxiv.org/abs/2208.03306; Loshchilov and Hutter (2019).
  """
  settings = dict(locals())
  rate = schedules.over(learning_rate, steps)
  optimizer = optax.adamw(
    rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
  )
  return _made('adamw', optimizer, max_gradient_norm, settings, rate)


def of_run(
  optimizer: optax.GradientTransformation
  | Callable[..., optax.GradientTransformation],
  steps: int,
  axes: axes_lib.Rules = (),
) -> optax.GradientTransformation:
  """The optimizer of a run.

  Args:
    optimizer: a transformation, taken as it is; or a function that makes one,
      such as `adafactor` with all but its `steps` bound by gin.
    steps: updates of the whole run.
    axes: of the model's stacked parameters that learn.
  """
  if not isinstance(optimizer, optax.GradientTransformation):
    optimizer = optimizer(steps=steps)
  of_model = getattr(optimizer, 'of_model', None)
  return of_model(axes) if axes and of_model else optimizer


def describe(optimizer: optax.GradientTransformation) -> Any:
  """The settings of an optimizer as plain data.

  One from elsewhere tells nothing of itself: `'unknown'`.
  """
  return getattr(optimizer, 'settings', 'unknown')


def _made(name, optimizer, max_gradient_norm, settings, rate):
  """Clips first if asked to, and notes the settings."""
  if max_gradient_norm is not None:
    optimizer = optax.chain(
      optax.clip_by_global_norm(max_gradient_norm), optimizer
    )
  made = Optimizer(optimizer.init, optimizer.update)
  settings = {'optimizer': name, **settings}
  del settings['steps']  # the learning rate has it, where it matters
  made.settings = {**settings, 'learning_rate': schedules.describe(rate)}
  return made
