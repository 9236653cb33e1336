# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluators, scores, and tables of models by tasks: one of each for all.

table = base.Table({'base': {'books': Score(0.7, 0.6, 0.8, ACCURACY)}})
table['base']['books'].value
print(table.to_text())
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mergejax.core import errors
from mergejax.core import typing

# `{task: score}`, higher is better.
Scores = Mapping[str, Any]


class ScoreFn(Protocol):
  """Scores parameters on data, `{task: score}`, traceable; higher is better."""

  def __call__(self, params: typing.Tree, data: Any, /) -> Scores: ...


class Evaluator(NamedTuple):
  """How good parameters are, in a form that can be compiled with a merge.

  Searches, barriers and training are handed one; `Suite.evaluator` makes one of
  the tasks of a suite or of a seqio mixture. A function `params -> {task:
  score}` serves wherever nothing must be compiled.

  Attributes:
    score: `(params, data) -> {task: score}`, traceable; higher is better.
    data: the arrays it reads, which stay on the device.

  Example:
    >>> near_one = Evaluator(lambda params, x: {'t': -abs(params - x)}, 1.0)
    >>> near_one(3.0)
    {'t': -2.0}
  """

  score: ScoreFn
  data: Any

  def __call__(self, params: typing.Tree) -> Scores:
    """`score(params, data)`, not compiled."""
    return self.score(params, self.data)

  def compiled(self) -> Callable[[typing.Tree], dict[str, float]]:
    """A function `params -> {task: score}`, one program for all parameters."""
    program = jax.jit(self.score)

    def evaluate(params):
      scores = jax.device_get(program(params, self.data))
      return {task: float(score) for task, score in scores.items()}

    return evaluate


@dataclasses.dataclass(frozen=True)
class Metric:
  """What a score measures.

  Attributes:
    name: as a suite names it; scores of one name share a unit and have a mean.
    higher_is_better: whether more is better; False for losses.
  """

  name: str
  higher_is_better: bool = True

  def describe(self) -> str:
    """The name in words, with the direction where it is not the usual one."""
    words = self.name.replace('_', ' ')
    return words if self.higher_is_better else f'{words} (lower is better)'


@dataclasses.dataclass(frozen=True)
class Score:
  """A value and its 95% bootstrap interval, in the metric's own direction."""

  value: float
  low: float
  high: float
  metric: Metric

  @property
  def goodness(self) -> float:
    """The value, negated where less is better: more is always better."""
    return self.value if self.metric.higher_is_better else -self.value


# Divided by the score of an expert.
SHARE = Metric('share of the expert')


class Table(Mapping[str, Mapping[str, Score]]):
  """Scores of models (rows) on tasks (columns): `table[model][task]`.

  Args:
    rows: `{model: {task: Score}}`, in the order of the table.

  Raises:
    StructureError: rows of other tasks, or another metric for one task.
  """

  def __init__(self, rows: Mapping[str, Mapping[str, Score]]):
    self._rows = {model: dict(scores) for model, scores in rows.items()}
    measured = {
      model: {task: score.metric for task, score in scores.items()}
      for model, scores in self._rows.items()
    }
    self.metrics: dict[str, Metric] = next(iter(measured.values()), {})
    for model, metrics in measured.items():
      if metrics != self.metrics:
        raise errors.StructureError(
          f'The row {model} of a table has {_listed(metrics)}, but the first '
          f'row has {_listed(self.metrics)}: score all models on the same '
          'tasks, in the same metrics.'
        )

  def __getitem__(self, model: str) -> Mapping[str, Score]:
    return self._rows[model]

  def __iter__(self) -> Iterator[str]:
    return iter(self._rows)

  def __len__(self) -> int:
    return len(self._rows)

  @property
  def tasks(self) -> list[str]:
    """The columns."""
    return list(self.metrics)

  @property
  def has_mean(self) -> bool:
    """Whether all tasks have one metric: accuracies and losses have no mean."""
    return len(set(self.metrics.values())) == 1

  def mean(self, model: str) -> float:
    """Unweighted mean of a model's scores over the tasks.

    Raises:
      StructureError: tasks of several metrics.
    """
    if not self.has_mean:
      raise errors.StructureError(
        f'{_listed(self.metrics)} have no mean: compare them task by task.'
      )
    return float(np.mean([score.value for score in self[model].values()]))

  def best(self, task: str) -> float:
    """The best value of a column."""
    pick = max if self.metrics[task].higher_is_better else min
    return pick(scores[task].value for scores in self.values())

  def numbers(self) -> dict[str, dict[str, float]]:
    """The plain values, and their mean where there is one."""
    return {
      model: {task: score.value for task, score in scores.items()}
      | ({'mean': self.mean(model)} if self.has_mean else {})
      for model, scores in self.items()
    }

  def to_text(self) -> str:
    """The table for a terminal, without intervals."""
    return to_text(self.numbers())

  def to_markdown(self) -> str:
    """The table in Markdown with intervals; the best of a column is bold."""
    bold = lambda text, on: f'**{text}**' if on else text
    columns = [*self.tasks, *(['mean'] if self.has_mean else [])]
    lines = [
      '| model | ' + ' | '.join(columns) + ' |',
      '|---' * (len(columns) + 1) + '|',
    ]
    if self.has_mean:
      metric = next(iter(self.metrics.values()))
      pick = max if metric.higher_is_better else min
      best_mean = pick(self.mean(model) for model in self)
    for model, scores in self.items():
      cells = []
      for task in self.tasks:
        s = scores[task]
        text = f'{s.value:.3f} ({s.low:.3f}-{s.high:.3f})'
        cells.append(bold(text, s.value == self.best(task)))
      if self.has_mean:
        mean = self.mean(model)
        cells.append(bold(f'{mean:.3f}', mean == best_mean))
      lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)

  def to_json(
    self, *, tasks: str = 'tasks', value: str = 'value'
  ) -> dict[str, Any]:
    """The table as plain numbers.

    Args:
      tasks: key of the scores by task; files about corpora say 'domains'.
      value: key of a value; files about corpora say 'bits_per_byte'.

    Returns:
      `{model: {'mean': ..., tasks: {task: {value: ..., 'low': ..., 'high':
      ...}}}}`, without 'mean' where the tasks have none.
    """
    return {
      model: ({'mean': self.mean(model)} if self.has_mean else {})
      | {
        tasks: {
          task: {value: s.value, 'low': s.low, 'high': s.high}
          for task, s in scores.items()
        }
      }
      for model, scores in self.items()
    }

  def normalised(self, experts: Mapping[str, str]) -> 'Table':
    """Scores over those of each task's own expert; more is better.

    Where less is better, the expert's score is divided by the model's.

    Args:
      experts: `{task: row of its expert}`; tasks without one are left out.

    Returns:
      A table with the tasks that have an expert; 1 is as good as the expert.

    Raises:
      DataError: an expert that is no row, or that scores 0.
    """
    for task, expert in experts.items():
      if expert not in self:
        raise errors.DataError(errors.near(expert, self, 'row of the table'))
      if not self[expert][task].value:
        raise errors.DataError(
          f'{expert} scores 0 on its own task {task}: nothing can be measured '
          'against that.'
        )

    def share(task, score):
      by = self[experts[task]][task].value
      if score.metric.higher_is_better:
        return Score(score.value / by, score.low / by, score.high / by, SHARE)
      over = lambda value: by / value if value else math.inf
      return Score(over(score.value), over(score.high), over(score.low), SHARE)

    return Table({
      model: {t: share(t, s) for t, s in scores.items() if t in experts}
      for model, scores in self.items()
    })  # fmt: skip


def _listed(metrics):
  return ', '.join(f'{task} ({m.name})' for task, m in metrics.items())


def to_text(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
  """Rows of plain numbers for a terminal.

  Example:
    >>> to_text({'a': {'x': 0.5}}).split()
    ['x', 'a', '0.500']
  """
  columns = list(next(iter(rows.values())))
  width = max(len(model) for model in rows) + 2
  widths = [max(len(c), digits + 3) + 2 for c in columns]
  head = ''.join(f'{c:>{w}}' for c, w in zip(columns, widths))
  lines = [' ' * width + head]
  for model, row in rows.items():
    cells = ''.join(f'{row[c]:>{w}.{digits}f}' for c, w in zip(columns, widths))
    lines.append(f'{model:<{width}}{cells}')
  return '\n'.join(lines)
