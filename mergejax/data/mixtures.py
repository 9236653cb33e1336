# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of tasks: proportional with a cap, tempered, equal or fixed rates.

A mixture may hold mixtures; the rate of a task in it is its own, and of each
mixture with the task, that one's rate by the task's share in it. seqio draws
examples independently, in proportion to these rates.

Source: Raffel et al. (2020), section 3.5.2; Arivazhagan et al. (2019),
https://arxiv.org/abs/1907.05019, for the temperature.
"""

from collections.abc import Mapping, Sequence
import hashlib
import math
from typing import NamedTuple

import seqio

from mergejax.core import errors
from mergejax.data import objectives
from mergejax.data import tasks as tasks_lib

# Of the mixtures in proportion that were registered here: cap and scale.
_SIZES: dict[str, tuple[float | None, float]] = {}


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
    The rate, in float64; a mixture's probabilities are the rates over their
    sum.

  Raises:
    UserError: a temperature that is not positive, a cap below 1, or a size that
      is no number.

  Example:
    >>> rate(400, cap=100, temperature=2)
    10.0
  """
  if not temperature > 0:
    raise errors.DataError(
      f'The temperature of a mixture must be positive, not {temperature}.'
    )
  if cap and not cap >= 1:
    raise errors.DataError(
      f'The cap on the size of a task is 1 example or more, not {cap}; None '
      'is no cap.'
    )
  size = examples * scale
  if not 0 <= size < math.inf:
    raise errors.DataError(
      f'A task has {examples} examples, scaled by {scale}: neither may be '
      'negative, infinite or NaN.'
    )
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
  scale: float = 1.0,
  by_content: bool = False,
) -> seqio.Mixture:
  """Registers a mixture of tasks under `name`.

  Args:
    name: the mixture's name in seqio.
    tasks: names of registered tasks, or `{task or mixture: fixed rate}`.
    rates: `'proportional'` (to the number of training examples, with `cap` and
      `temperature`) or `'equal'`.
    cap: see `rate`.
    temperature: see `rate`.
    scale: see `rate`.
    by_content: append a digest of tasks and rates to the name, so that it
      cannot be that of another mixture.

  Returns:
    The mixture.

  Raises:
    UserError: no task, an unknown task, an unknown kind of rates, rates that
      are negative, NaN or all 0, a task whose number of training examples is
      not known (for proportional rates), tasks of other features or
      vocabularies, or a name that is taken by a task or another mixture.
  """
  if not tasks:
    raise errors.DataError(f'The mixture {name!r} has no task.')
  fixed = isinstance(tasks, Mapping)
  known = seqio.TaskRegistry.names()
  if fixed:
    known = [*known, *seqio.MixtureRegistry.names()]
  for task in tasks:
    if task not in known:
      raise errors.DataError(errors.near(task, known, 'task'))
  if fixed:
    pairs = list(tasks.items())
  elif rates == 'equal':
    pairs = [(task, 1.0) for task in tasks]
  elif rates == 'proportional':
    sizes = {task: tasks_lib.num_examples(task) for task in tasks}
    pairs = [
      (task, rate(size, cap=cap, temperature=temperature, scale=scale))
      for task, size in sizes.items()
    ]
  else:
    raise errors.DataError(
      errors.near(rates, ['proportional', 'equal'], 'kind of mixing rates')
    )
  _check_rates(name, pairs)
  members = [(seqio.get_mixture_or_task(one), rate) for one, rate in pairs]
  _check_features(name, [member for member, _ in members])
  mixture = seqio.Mixture(name, members)
  if by_content:
    digest = hashlib.sha256(repr(_content(mixture)).encode()).hexdigest()
    name = f'{name}_{digest[:16]}'
  _make_room(name, mixture)
  _SIZES.pop(name, None)
  if not fixed and rates == 'proportional':
    _SIZES[name] = cap, scale
  return seqio.MixtureRegistry.add(name, members)


def _check_rates(name, pairs):
  for task, value in pairs:
    if not 0 <= value < math.inf:
      raise errors.DataError(
        f'The rate of {task} in the mixture {name!r} is {value}: a rate is 0 '
        'or more.'
      )
  if not any(value for _, value in pairs):
    raise errors.DataError(
      f'All rates of the mixture {name!r} are 0: nothing would be drawn.'
    )


def _check_features(name, members):
  """Raises if tasks differ in their features or vocabularies; names two."""
  tasks = [task for one in members for task in seqio.get_subtasks(one)]
  first = tasks[0]
  for task in tasks[1:]:
    ours, theirs = first.output_features, task.output_features
    if list(ours) != list(theirs):
      raise errors.DataError(
        f'The mixture {name!r} has tasks of different features: {first.name} '
        f'has {", ".join(ours)}, {task.name} has {", ".join(theirs)}.'
      )
    for feature in ours:
      if ours[feature].vocabulary != theirs[feature].vocabulary:
        raise errors.DataError(
          f'The mixture {name!r} has tasks of different vocabularies: '
          f'{feature} of {first.name} are tokens of '
          f'{_told(ours[feature].vocabulary)}, those of {task.name} of '
          f'{_told(theirs[feature].vocabulary)}. Give all the same.'
        )


def _told(vocabulary):
  return f'{type(vocabulary).__name__} ({vocabulary.vocab_size} ids)'


def _make_room(name, mixture):
  """Removes a mixture of the same content; raises if it has another one."""
  if name in seqio.TaskRegistry.names():
    raise errors.DataError(
      f'There is a task {name!r} already: give the mixture another name.'
    )
  if name not in seqio.MixtureRegistry.names():
    return
  if _content(mixture) != _content(seqio.MixtureRegistry.get(name)):
    raise errors.DataError(
      f'There is a mixture {name!r} of other tasks or rates already: give '
      'this one another name, or remove that one with '
      f'seqio.MixtureRegistry.remove({name!r}).'
    )
  seqio.MixtureRegistry.remove(name)


def _content(mixture):
  """What makes two mixtures the same: the content of their tasks, the rates."""
  return sorted(
    (
      task.name,
      str(getattr(task.source, 'identity', id(task))),
      float(mixture.get_rate(task)),
    )
    for task in mixture.tasks
  )


class Share(NamedTuple):
  """A task's part in a mixture.

  Attributes:
    task: its name.
    examples: training examples, before documents are cut; None if not known.
    capped: the size that its rate is made of, scaled and capped; None if the
      rate is fixed, or this is not known.
    rate: in the mixture, see the module.
    probability: that an example drawn is of this task.
    epochs: expected, over its examples; None if it is not known how many are
      drawn or how many there are, or if what is drawn are no examples but
      rows that documents are joined and cut into.
  """

  task: str
  examples: int | None
  capped: float | None
  rate: float
  probability: float
  epochs: float | None


def probabilities(
  mixture: seqio.Mixture | str,
  *,
  steps: int | None = None,
  batch_size: int | None = None,
  examples_per_row: float = 1.0,
) -> list[Share]:
  """What a mixture draws, by task, in the order of their names.

  Args:
    mixture: registered in seqio, or its name.
    steps: of a run, for the expected epochs.
    batch_size: rows of a step.
    examples_per_row: more than 1 where rows are packed.

  Returns:
    A row for every task, also those of rate 0. Probabilities sum to 1.

  Raises:
    DataError: rates that are negative, NaN or all 0.
  """
  if isinstance(mixture, str):
    mixture = seqio.MixtureRegistry.get(mixture)
  rates = {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
  _check_rates(mixture.name, rates.items())
  total = math.fsum(rates.values())
  drawn = None
  if steps is not None and batch_size is not None:
    drawn = steps * batch_size * examples_per_row
  shares = []
  for task in mixture.tasks:
    count = _examples(task)
    chance = rates[task.name] / total
    epochs = None
    if drawn is not None and count and _is_row_an_example(task):
      epochs = drawn * chance / count
    capped = _capped(mixture, task, count)
    shares.append(
      Share(task.name, count, capped, rates[task.name], chance, epochs)
    )
  return shares


def _is_row_an_example(task):
  """Whether rows are examples, and not cut of documents end to end."""
  by_row = getattr(task.source, 'example_a_row', True)
  return by_row and not objectives.makes_rows(task)


def _examples(task):
  try:
    return tasks_lib.num_examples(task.name)
  except (errors.DataError, KeyError, ValueError):
    return None  # no training split, or a set that is not on this machine


def _capped(mixture, task, count):
  """The size that a task's rate is made of, where it stands in a mixture."""
  if count is None:
    return None
  if task.name in mixture.rate_per_task_name:
    rate_of = mixture.rate_per_task_name[task.name]
    if getattr(rate_of, 'func', rate_of) is seqio.mixing_rate_num_examples:
      given = getattr(rate_of, 'keywords', {})
      cap, scale = given.get('maximum'), given.get('scale', 1.0)
    elif mixture.name in _SIZES:
      cap, scale = _SIZES[mixture.name]
    else:
      return None
    return min(count * scale, cap) if cap else count * scale
  for name in mixture.rate_per_task_name:
    inner = seqio.get_mixture_or_task(name)
    if isinstance(inner, seqio.Mixture) and _holds(inner, task):
      return _capped(inner, task, count)
  return None


def _holds(mixture, task):
  """By name: a task registered again is the same, in another object."""
  return task.name in {member.name for member in mixture.tasks}


def table(shares: Sequence[Share]) -> str:
  """Shares as text for people, a line each, the likeliest first."""
  width = max(4, *(len(share.task) for share in shares))
  whole = lambda x: '?' if x is None else f'{x:,.0f}'
  lines = [
    f'{"task":<{width}}  {"examples":>12}  {"capped":>12}  {"rate":>12}  '
    f'{"probability":>11}  {"epochs":>8}'
  ]
  for share in sorted(shares, key=lambda each: -each.probability):
    epochs = '?' if share.epochs is None else f'{share.epochs:.2f}'
    lines.append(
      f'{share.task:<{width}}  {whole(share.examples):>12}  '
      f'{whole(share.capped):>12}  {share.rate:>12.6g}  '
      f'{share.probability:>11.4%}  {epochs:>8}'
    )
  return '\n'.join(lines)
