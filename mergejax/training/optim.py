# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers, through optax, with the settings of the papers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import factors
from mergejax.training import schedules
from mergejax.training import slices
from mergejax.training import updates

# Options of `adafactor` that runs of earlier versions do not tell of.
_LATER = {
  'factored': True,
  'multiply_by_parameter_scale': True,
  'weight_decay_rate': None,
  'weight_decay_rate_lr_exponent': None,
  'max_parameter_scale': None,
  'epsilon1': 1e-30,
  'epsilon2': 1e-3,
  'dtype_momentum': 'float32',
  'skip_nan_updates': False,
  'logical_factor_rules': None,
  'factor_map': (),
}

# What a run takes as its optimizer: a function is called with its `steps=`.
OptimizerLike = (
  optax.GradientTransformation | Callable[..., optax.GradientTransformation]
)
LearningRate = float | schedules.Schedule | schedules.Spanning


# What an optimizer of another library tells of itself.
UNKNOWN = 'unknown'


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
  factored: bool = True,
  multiply_by_parameter_scale: bool = True,
  momentum: float | None = None,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  clipping_threshold: float | None = 1.0,
  weight_decay_rate: float | None = None,
  weight_decay_rate_lr_exponent: float | None = None,
  max_gradient_norm: float | None = None,
  max_parameter_scale: float | None = None,
  min_dim_size_to_factor: int = 128,
  epsilon1: float = 1e-30,
  epsilon2: float = 1e-3,
  dtype_momentum: Any = 'float32',
  skip_nan_updates: bool = False,
  axes: axes_lib.Rules = (),
  logical_factor_rules: Mapping[str, str] | None = None,
  factor_map: Sequence[tuple[str, Sequence[str]]] = (),
  steps: int | None = None,
) -> Optimizer:
  """Adafactor as T5 uses it: relative updates, factored second moments.

  The update of a parameter is scaled by its root mean square (at least 1e-3),
  so one learning rate serves embeddings of scale 1 and small kernels alike.
  Layers, experts or branches stacked in one array are scaled, clipped and
  factored each by themselves, as if they were not stacked.

      theta <- (1 - wd) theta - lr max(rms(theta), eps2) clip(g / sqrt(v))

  Args:
    learning_rate: relative step size; T5 pre-trains with `1/sqrt(max(t, 1e4))`
      and fine-tunes with 0.001.
    factored: keep means of rows and columns instead of all second moments.
    multiply_by_parameter_scale: relative updates; False makes the learning
      rate a step of its own.
    momentum: T5X's `beta1`; off, as in T5.
    decay_rate: second moments decay by `1 - (t + 1)^-decay_rate`.
    step_offset: steps already made elsewhere, subtracted in that formula.
    clipping_threshold: limit of an update's root mean square; None: no limit.
    weight_decay_rate: wd, which no learning rate multiplies; off, as in T5.
    weight_decay_rate_lr_exponent: `wd lr^exponent` instead, of wd 1 where it
      is not given.
    max_gradient_norm: T5X's `global_norm_clip_threshold`: clip the global
      gradient norm first; off, as in T5.
    max_parameter_scale: upper limit of a parameter's root mean square above.
    min_dim_size_to_factor: matrices whose sides are both at least this long
      are factored; T5X's 128.
    epsilon1: added to squared gradients.
    epsilon2: eps2, the lower limit of a parameter's root mean square.
    dtype_momentum: in which the momentum is kept.
    skip_nan_updates: numbers that would be NaN stay, see `updates.skip_nan`.
    axes: `[(path, logical axes)]` of stacked parameters, as in `mj.merge`:
      `[('.*/layers/mlp/wi/kernel', ('layers', 'embed', 'mlp'))]`. Axes called
      `layers`, `expert`, `branch` (see `axes.STACKS`) stack. A `Trainer` tells
      those that the model's family knows. An optimizer does not see what is
      frozen: a rule for nothing else is refused.
    logical_factor_rules: `{logical axis: 'row', 'column' or 'none'}`, such as
      `standard_logical_factor_rules()`: stacks, and parameters of more than
      two axes, are factored by it whatever their size, as T5X does. By default
      a stack is factored if its slices would be.
    factor_map: `[(path, one part an axis)]` likewise, with `'batch'` for axes
      that stack; it goes before `logical_factor_rules`.
    steps: length of the run, for a learning rate that spans it; jobs tell it.

  Returns:
    An optax transformation. Its `init` raises a `UserError` for a parameter of
    three axes or more if it is not known whether one of them stacks.

  Raises:
    UserError: a learning rate that spans a run of unknown length; rules of
      what is factored, and `factored=False`.

  Source: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235; T5X
  `adafactor.py`, whose factor rules take stacked axes as batch axes.
  """
  settings = _changed(dict(locals()))
  rules = factors.Factors(logical_factor_rules, tuple(factor_map))
  if not factored and rules != factors.Factors():
    raise errors.ConfigError(
      'factored=False keeps all second moments, yet logical_factor_rules or '
      'factor_map say how to factor them: leave them out.'
    )
  rate = schedules.over(learning_rate, steps)

  def make(by_rule: bool | None) -> optax.GradientTransformation:
    parts = [
      updates.scale_by_clipped_factored_rms(
        factored if by_rule is None else by_rule,
        decay_rate,
        step_offset,
        1 if by_rule else min_dim_size_to_factor,
        epsilon1,
        clipping_threshold,
      )
    ]
    if clipping_threshold is not None:
      parts.append(optax.identity())  # Where optax.adafactor clips.
    parts.append(optax.scale_by_learning_rate(rate, flip_sign=False))
    if multiply_by_parameter_scale:
      parts.append(
        updates.scale_by_parameter_rms(epsilon2, max_parameter_scale)
      )
    if momentum is not None:
      dtype = None if dtype_momentum is None else jnp.dtype(dtype_momentum)
      parts.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype))
    decay = _decay(rate, weight_decay_rate, weight_decay_rate_lr_exponent)
    if decay is not None:
      parts.append(optax.add_decayed_weights(decay))
    made = optax.chain(*parts, optax.scale(-1))
    return updates.skip_nan(made) if skip_nan_updates else made

  def of_model(known: axes_lib.Rules) -> Optimizer:
    of_slices = slices.per_slice(
      make, axes, known,
      factors=rules, one_model=max_gradient_norm is not None,
    )  # fmt: skip
    return _made('adafactor', of_slices, max_gradient_norm, settings, rate)

  made = of_model(())
  made.of_model = of_model
  return made


def standard_logical_factor_rules() -> dict[str, str]:
  """T5X's rules of what Adafactor factors, by logical axis.

  For `adafactor(logical_factor_rules=...)`: state of scanned layers that goes
  to and from T5X must be factored as T5X does it.
  """
  return dict(factors.STANDARD)


def _changed(settings):
  """Settings of a run, those that came later only where they are not usual.

  A run that was begun before there was an option goes on with its default.
  """
  for name, usual in _LATER.items():
    if settings[name] == usual:
      del settings[name]
  return settings


def _decay(rate, constant, exponent):
  """The weight decay of a step: a number, a function of the step, or None."""
  if not exponent:
    return constant
  scale = constant or 1.0
  if callable(rate):
    return lambda count: scale * rate(count) ** exponent
  return scale * rate**exponent


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


def by_group(
  groups: Mapping[typing.Path, str],
  optimizers: Mapping[str, optax.GradientTransformation],
) -> Optimizer:
  """An optimizer for each group of parameters, such as what routes.

  Args:
    groups: `{path: group}` of all that learns; `Adapted.groups` tells those of
      an adapter.
    optimizers: `{group: optimizer}`.

  Raises:
    ConfigError: a group without an optimizer, or an optimizer without a group.

  Example:
    >>> optimizer = by_group(
    ...   {'gate': 'router', 'kernel': 'rest'},
    ...   {'router': adafactor(0.1), 'rest': adafactor(1e-3)},
    ... )
    >>> sorted(optimizer.settings)
    ['rest', 'router']
  """
  named = {*groups.values()}
  if named != {*optimizers}:
    told = lambda names: ' and '.join(sorted(names)) or 'none'
    raise errors.ConfigError(
      f'There are parameters of {told(named)}, and optimizers are given for '
      f'{told(optimizers)}: give one for each.'
    )
  plain = optax.multi_transform(
    {**optimizers},
    lambda params: tree.map_paths(lambda path, _: groups[path], params),
  )

  def of_model(known: axes_lib.Rules) -> Optimizer:
    own = lambda name: {
      p: a for p, a in dict(known).items() if groups[p] == name
    }
    told = {
      name: of_run(each, 0, own(name)) for name, each in optimizers.items()
    }
    return by_group(groups, told)

  made = Optimizer(plain.init, plain.update)
  made.settings = {name: describe(each) for name, each in optimizers.items()}
  made.of_model = of_model
  return made


def of_run(
  optimizer: OptimizerLike,
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

  One from elsewhere tells nothing of itself: `UNKNOWN`.
  """
  return getattr(optimizer, 'settings', UNKNOWN)


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
