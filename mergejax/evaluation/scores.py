# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores with bootstrap intervals, and tables of models by tasks."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from mergejax.core import errors


@dataclasses.dataclass(frozen=True)
class Score:
  """A value and its 95% bootstrap interval."""

  value: float
  low: float
  high: float


# {model: {task: Score}}, models in the order of the table.
Table = Mapping[str, Mapping[str, Score]]


def bootstrap(
  numerators: np.ndarray, denominators: np.ndarray, *, resamples: int = 1000
) -> Score:
  """`sum numerators / sum denominators` over examples, with its interval.

  Args:
    numerators: <float>[examples], hits or bits.
    denominators: <float>[examples], ones or bytes. An example with 0 of both
      fills a batch and does not count.
    resamples: bootstrap samples of examples, drawn with a fixed seed.

  Returns:
    The ratio and the 2.5% and 97.5% quantiles of its bootstrap distribution.

  Raises:
    UserError: no example.

  Example:
    >>> bootstrap(np.ones(4), np.ones(4))
    Score(value=1.0, low=1.0, high=1.0)
  """
  up = np.asarray(numerators, np.float64)
  down = np.asarray(denominators, np.float64)
  real = (up != 0) | (down != 0)
  up, down = up[real], down[real]
  if not len(up) or not down.sum():
    raise errors.DataError('There is no example to score.')
  picks = np.random.default_rng(0).integers(0, len(up), (resamples, len(up)))
  tops, bottoms = up[picks].sum(axis=1), down[picks].sum(axis=1)
  there = bottoms > 0  # a sample of ends of documents alone has no ratio
  ratios = tops[there] / bottoms[there]
  low, high = np.quantile(ratios, [0.025, 0.975])
  return Score(float(up.sum() / down.sum()), float(low), float(high))


def normalised(
  table: Table,
  experts: Mapping[str, str],
  lower_is_better: Sequence[str] = (),
) -> Table:
  """Scores over those of each task's own expert.

  Args:
    table: raw scores.
    experts: `{task: row of its expert}`; tasks without one are left out.
    lower_is_better: tasks whose expert's score is divided by the model's
      instead, so that more is better in every column and in their mean.

  Returns:
    A table with the tasks that have an expert; 1 is as good as the expert.

  Raises:
    UserError: an expert that is no row, or that scores 0.
  """
  for task, expert in experts.items():
    if expert not in table:
      raise errors.DataError(errors.near(expert, table, 'row of the table'))
    if not table[expert][task].value:
      raise errors.DataError(
        f'{expert} scores 0 on its own task {task}: nothing can be measured '
        'against that.'
      )

  def over(score, task):
    by = table[experts[task]][task].value
    if task not in lower_is_better:
      return Score(score.value / by, score.low / by, score.high / by)
    share = lambda value: by / value if value else np.inf
    return Score(*map(share, (score.value, score.high, score.low)))

  return {
    model: {t: over(s, t) for t, s in own.items() if t in experts}
    for model, own in table.items()
  }


def mean(own: Mapping[str, Score]) -> float:
  """Unweighted mean over tasks."""
  return float(np.mean([score.value for score in own.values()]))


def values(
  table: Table, *, with_mean: bool = True
) -> dict[str, dict[str, float]]:
  """The plain numbers, and their mean over tasks where they have one unit."""
  return {
    model: {t: s.value for t, s in own.items()}
    | ({'mean': mean(own)} if with_mean else {})
    for model, own in table.items()
  }


def to_text(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
  """Rows of numbers for a terminal.

  Example:
    >>> to_text({'a': {'x': 0.5}}).split()
    ['x', 'a', '0.500']
  """
  columns = list(next(iter(rows.values())))
  width = max(len(model) for model in rows) + 2
  widths = [max(len(c), digits + 3) + 2 for c in columns]
  head = ''.join(f'{c:>{w}}' for c, w in zip(columns, widths))
  lines = [' ' * width + head]
  for model, own in rows.items():
    cells = ''.join(f'{own[c]:>{w}.{digits}f}' for c, w in zip(columns, widths))
    lines.append(f'{model:<{width}}{cells}')
  return '\n'.join(lines)


def to_markdown(table: Table, *, lower_is_better: Sequence[str] = ()) -> str:
  """The table in Markdown; the best of each column is bold."""
  tasks = list(next(iter(table.values())))
  best = {
    t: (min if t in lower_is_better else max)(
      own[t].value for own in table.values()
    )
    for t in tasks
  }
  lines = [
    '| model | ' + ' | '.join([*tasks, 'mean']) + ' |',
    '|---' * (len(tasks) + 2) + '|',
  ]
  for model, own in table.items():
    cells = []
    for t in tasks:
      s = own[t]
      text = f'{s.value:.3f} ({s.low:.3f}-{s.high:.3f})'
      cells.append(f'**{text}**' if s.value == best[t] else text)
    lines.append(
      f'| {model} | ' + ' | '.join([*cells, f'{mean(own):.3f}']) + ' |'
    )
  return '\n'.join(lines)


def to_json(table: Table, *, with_mean: bool = True) -> dict[str, Any]:
  """The table as plain numbers; see `values`."""
  return {
    model: ({'mean': mean(own)} if with_mean else {})
    | {'tasks': {t: dataclasses.asdict(s) for t, s in own.items()}}
    for model, own in table.items()
  }
