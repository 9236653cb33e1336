# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of tasks: proportional with a cap, tempered, equal or fixed rates.

Source: Raffel et al. (2020), section 3.5.2; Arivazhagan et al. (2019),
https://arxiv.org/abs/1907.05019, for the temperature.
"""

from collections.abc import Mapping, Sequence
import hashlib

import seqio

from mergejax.core import errors
from mergejax.data import tasks as tasks_lib


def rate(
  examples: float,
  *,
  cap: float | None = None,
  temperature: float = 1.0,
  scale: float = 1.0,
) -> float:
  """Mixing rate of one task: `min(examples * scale, cap) ^ (1 / temperature)`.

  The cap comes before the temperature, as in T5.

  Args:
    examples: number of training examples.
    cap: artificial limit on the size; None or 0 for none. T5 used 2^19 for
      proportional mixing, 2^21 with a temperature of 2.
    temperature: 1 is proportional; larger is closer to equal mixing.
    scale: multiplies the size first.

  Returns:
    The rate; a mixture's probabilities are the rates over their sum.

  Raises:
    UserError: a temperature that is not positive.

  Example:
    >>> rate(400, cap=100, temperature=2)
    10.0
  """
  if temperature <= 0:
    raise errors.DataError(
      f'The temperature of a mixture must be positive, not {temperature}.'
    )
  size = examples * scale
  if cap:
    size = min(size, cap)
  return float(size ** (1.0 / temperature))


def add_mixture(
  name: str,
  tasks: Sequence[str] | Mapping[str, float],
  *,
  rates: str = 'proportional',
  cap: float | None = None,
  temperature: float = 1.0,
  by_content: bool = False,
) -> seqio.Mixture:
  """Registers a mixture of tasks under `name`.

  Args:
    name: the mixture's name in seqio.
    tasks: names of registered tasks, or `{task: fixed rate}`.
    rates: `'proportional'` (to the number of training examples, with `cap` and
      `temperature`) or `'equal'`.
    cap: see `rate`.
    temperature: see `rate`.
    by_content: append a digest of tasks and rates to the name, so that it
      cannot be that of another mixture.

  Returns:
    The mixture.

  Raises:
    UserError: no task, an unknown task, an unknown kind of rates, a task whose
      number of training examples is not known (for proportional rates), or a
      name that is taken by another mixture.
  """
  if not tasks:
    raise errors.DataError(f'The mixture {name!r} has no task.')
  known = seqio.TaskRegistry.names()
  for task in tasks:
    if task not in known:
      raise errors.DataError(errors.near(task, known, 'task'))
  if isinstance(tasks, Mapping):
    pairs = list(tasks.items())
  elif rates == 'equal':
    pairs = [(task, 1.0) for task in tasks]
  elif rates == 'proportional':
    sizes = {task: tasks_lib.num_examples(task) for task in tasks}
    pairs = [
      (task, rate(size, cap=cap, temperature=temperature))
      for task, size in sizes.items()
    ]
  else:
    raise errors.DataError(
      errors.near(rates, ['proportional', 'equal'], 'kind of mixing rates')
    )
  members = [(seqio.TaskRegistry.get(task), rate) for task, rate in pairs]
  if by_content:
    digest = hashlib.sha256(repr(_content(members)).encode()).hexdigest()
    name = f'{name}_{digest[:16]}'
  if name in seqio.MixtureRegistry.names():
    old = seqio.MixtureRegistry.get(name)
    if _content(members) != _content(_members(old)):
      raise errors.DataError(
        f'There is a mixture {name!r} of other tasks or rates already: give '
        'this one another name, or remove that one with '
        f'seqio.MixtureRegistry.remove({name!r}).'
      )
    seqio.MixtureRegistry.remove(name)
  return seqio.MixtureRegistry.add(name, members)


def _members(mixture):
  rates = mixture.rate_per_task_name
  return [(task, rates.get(task.name)) for task in mixture.tasks]


def _content(members):
  """What makes two mixtures the same: the content of their tasks, the rates."""
  return sorted(
    (task.name, str(getattr(task.source, 'identity', id(task))), rate)
    for task, rate in members
  )
