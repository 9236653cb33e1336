# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gates of a ladder that follow a schedule instead of learning."""

import re

import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import schedules
from mergejax.training import transforms

_GATE = re.compile(r'side/(.*/)?gate_[^/]*')


def scheduled(
  gate: schedules.Schedule,
  *,
  temperature: float = 0.1,
  name: str = 'gate',
) -> transforms.StepTransform:
  """After every step each gate of a ladder is what a schedule says.

  `alpha = temperature log(mu / (1 - mu))`, `mu = gate(step)`, of all layers and
  of `merge_last`. The first step has the ladder's own `gate`, which is best that
  of the schedule at 0. Take `ladder(gates='fixed')`, so that no gradient and no
  moment is spent on them.

  Args:
    gate: `step -> mu`, the share of the side state, above 0 and below 1.
    temperature: of the ladder.
    name: of its state, and of the metric that says mu.

  Returns:
    A transform of `mergejax train` or `Trainer`.

  Raises:
    ConfigError: a number that is no share, at step 0 or where metrics are
      logged; in training, a model without such gates.

  Example:
    >>> import optax
    >>> opening = scheduled(optax.linear_schedule(0.1, 0.9, 1000))
    >>> opening.settings['temperature']
    0.1

  Source: the released code of Sung, Cho and Bansal, "LST" (2022),
  https://arxiv.org/abs/2206.06522. Its schedules move once an epoch: linear from
  0.1 to 0.9, as above, or `1 / (1 + epoch)` within these.
  """
  errors.check_number('temperature', temperature, 0, open_below=True)
  _check(0, float(gate(0)))

  def init(params):
    if not any(_GATE.fullmatch(path) for path in tree.flatten(params)):
      raise errors.ConfigError(
        'scheduled moves the gates of a ladder, side/.../gate_0 and so on, and '
        "the parameters have none: it is for ladder(gates='fixed')."
      )
    return jnp.zeros((), jnp.float32)

  def update(extra, old, new, metrics):
    del extra, old
    mu = jnp.asarray(gate(new.step), jnp.float32)
    alpha = temperature * (jnp.log(mu) - jnp.log1p(-mu))
    moved = lambda path, leaf: alpha if _GATE.fullmatch(path) else leaf
    new = new.replace(params=tree.map_paths(moved, new.params))
    return mu, new, {**metrics, name: mu}

  def check(step, metrics):
    _check(step, float(metrics[name]))

  settings = {'gate': schedules.describe(gate), 'temperature': temperature}
  return transforms.StepTransform(name, init, update, check, settings=settings)


def _check(step, mu):
  if not 0 < mu < 1:
    raise errors.ConfigError(
      f'The schedule of the gates says {mu:g} at step {step}: the share of the '
      'side state is above 0 and below 1. Let it end before.'
    )
