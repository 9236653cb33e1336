# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: T5X's products of factors, and warm-up with cosine.

Every schedule is a function of the step, usable under `jit`, as in optax.
"""

from collections.abc import Callable, Mapping
import dataclasses
import numbers
from typing import Any

import jax.numpy as jnp
import optax

from mergejax.core import errors

Schedule = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Spanning:
  """A schedule that spans a run, before it is known how long the run is.

  The job that makes the run tells it, so that no length is written twice.

  Attributes:
    make: gives the schedule of a run of so many steps.
  """

  make: Callable[[int], Schedule]

  def __call__(self, step: int) -> float:
    raise errors.ConfigError(
      'This learning rate spans a run whose length it was not told. In gin, '
      'write the optimizer without parentheses, '
      '`optimizer = @optim.adafactor`, and the job tells it; in Python, give `steps=` to the optimizer or the '
      'schedule.'
    )


def over(
  rate: float | Schedule | Spanning, steps: int | None
) -> float | Schedule:
  """The learning rate of a run of `steps` steps; others than `Spanning` as is.

  Raises:
    UserError: the rate spans a run, and `steps` is None.
  """
  if not isinstance(rate, Spanning):
    return rate
  return rate(0) if steps is None else rate.make(steps)


def describe(rate: float | Schedule) -> Any:
  """A learning rate as plain data: a number, or what the schedule was made of.

  A schedule from elsewhere is told by its name alone.
  """
  if isinstance(rate, numbers.Number):
    return float(rate)
  return getattr(rate, 'settings', getattr(rate, '__qualname__', repr(rate)))


def _told(schedule: Schedule, name: str, settings: Mapping[str, Any]):
  """The schedule, with what it was made of."""
  schedule.settings = {'schedule': name, **settings}
  return schedule


def factors(
  factors: str = 'constant * linear_warmup * rsqrt_decay',
  *,
  base_learning_rate: float = 0.5,
  warmup_steps: int = 1000,
  decay_factor: float = 0.5,
  steps_per_decay: int = 20000,
  steps_per_cycle: int = 100000,
  step_offset: int = 0,
  min_learning_rate: float = 1e-8,
) -> Schedule:
  """A product of named factors, as T5X writes it.

  Args:
    factors: names joined by `*`: `constant` (the base), `linear_warmup`
      (`min(1, t/w)`), `linear_decay` (`base * min(t/w, 1 + d (w - t))`, which
      holds base and warm-up itself), `rsqrt_decay` (`1/sqrt(max(t, w))`),
      `rsqrt_normalized_decay` (`sqrt(w)/sqrt(max(t, w))`), `decay_every`
      (`d^floor(t / steps_per_decay)`), `cosine_decay`
      (`(1 + cos(pi (max(0, t - w)/cycle mod 1)))/2`).
    base_learning_rate: the value of `constant`.
    warmup_steps: w above.
    decay_factor: d above.
    steps_per_decay: see `decay_every`.
    steps_per_cycle: see `cosine_decay`.
    step_offset: subtracted from the step first (fine-tuning a checkpoint that
      carries its step).
    min_learning_rate: floor of the result, T5X's 1e-8: warm-up at step 0 gives
      this, not 0.

  Returns:
    `schedule(step) -> <float32>[]`.

  Raises:
    UserError: an unknown factor.

  Example:
    >>> float(factors('constant * rsqrt_decay', base_learning_rate=1.0,
    ...               warmup_steps=10000)(0))  # T5's pre-training schedule
    0.009999999776482582

  Source: T5X `utils.create_learning_rate_scheduler`.
  """
  settings = dict(locals())
  names = [name.strip() for name in factors.split('*')]
  known = {
    'constant': lambda t: base_learning_rate,
    'linear_warmup': lambda t: jnp.minimum(1.0, t / warmup_steps),
    'linear_decay': lambda t: (
      base_learning_rate
      * jnp.minimum(t / warmup_steps, 1 + decay_factor * (warmup_steps - t))
    ),
    'rsqrt_decay': lambda t: 1 / jnp.sqrt(jnp.maximum(t, warmup_steps)),
    'rsqrt_normalized_decay': lambda t: (
      jnp.sqrt(float(warmup_steps)) / jnp.sqrt(jnp.maximum(t, warmup_steps))
    ),
    'decay_every': lambda t: decay_factor ** (t // steps_per_decay),
    'cosine_decay': lambda t: jnp.maximum(
      0.0,
      0.5
      * (
        1
        + jnp.cos(
          jnp.pi * (jnp.maximum(0.0, t - warmup_steps) / steps_per_cycle % 1.0)
        )
      ),
    ),
  }
  for name in names:
    if name not in known:
      raise errors.ConfigError(errors.near(name, known, 'schedule factor'))

  def schedule(step):
    t = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
    rate = jnp.ones((), jnp.float32)
    for name in names:
      rate = rate * known[name](t)
    return jnp.maximum(rate, min_learning_rate)

  return _told(schedule, 'factors', settings)


def warmup_linear(
  peak: float,
  *,
  warmup: int | float = 0.06,
  steps: int | None = None,
) -> Schedule | Spanning:
  """Linear warm-up from 0 to `peak`, then linearly to 0 at the last step.

  Args:
    peak: highest learning rate.
    warmup: steps of warm-up, part of `steps`; or, below 1, their share of them,
      rounded down. T-Few's and Polytropon's 0.06.
    steps: total steps. By default the length of the run, which its job tells.

  Returns:
    `schedule(step) -> <float32>[]`, or what makes it of the steps of a run.

  Raises:
    ConfigError: the warm-up is longer than the run.

  Example:
    >>> rate = over(warmup_linear(1.0), 100)
    >>> [round(float(rate(step)), 2) for step in (0, 3, 6, 53, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

  Source: Liu et al. (2022), https://arxiv.org/abs/2205.05638, section 3.4.
  """
  if steps is None:
    return Spanning(
      lambda length: warmup_linear(peak, warmup=warmup, steps=length)
    )
  settings = dict(locals())
  first = int(warmup * steps) if warmup < 1 else warmup
  if not (isinstance(first, int) and 0 <= first < steps):
    raise errors.ConfigError(
      f'A warm-up of {warmup} does not fit into {steps} steps: give a whole number '
      'of steps, a share below 1, or train longer.'
    )

  def schedule(step):
    t = jnp.asarray(step, jnp.float32)
    up, down = t / max(first, 1), (steps - t) / (steps - first)
    return peak * jnp.clip(jnp.where(t < first, up, down), 0.0, 1.0)

  return _told(schedule, 'warmup_linear', settings)


def warmup_cosine(
  peak: float,
  *,
  warmup_steps: int,
  steps: int | None = None,
  final_share: float = 0.1,
) -> Schedule | Spanning:
  """Linear warm-up from 0 to `peak`, then a cosine to `final_share * peak`.

  Args:
    peak: highest learning rate.
    warmup_steps: steps of warm-up, part of `steps`.
    steps: total steps; the rate stays at its last value afterwards. By default
      the length of the run, which its job tells.
    final_share: last rate as a share of the peak.

  Returns:
    `schedule(step) -> <float32>[]`, or what makes it of the steps of a run.

  Raises:
    UserError: the warm-up is longer than the run.

  Example:
    >>> rate = over(warmup_cosine(1.0, warmup_steps=10), 100)
    >>> float(rate(10)), round(float(rate(100)), 4)
    (1.0, 0.1)
  """
  if steps is None:
    return Spanning(
      lambda length: warmup_cosine(
        peak, warmup_steps=warmup_steps, steps=length, final_share=final_share
      )
    )
  settings = dict(locals())
  if not 0 <= warmup_steps < steps:
    raise errors.ConfigError(
      f'{warmup_steps} warm-up steps do not fit into {steps} steps: lower '
      'warmup_steps (WARMUP_STEPS of the gin files), or train longer.'
    )
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, peak, warmup_steps, steps, peak * final_share
  )
  return _told(schedule, 'warmup_cosine', settings)
