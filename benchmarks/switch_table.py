# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables and the figure of `switch.py`, from its rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib import figure as figures
import numpy as np
import real_data

Row = Mapping[str, Any]


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
  """The first step at which a curve is at a loss, or below; None if never.

  Between two points it is a line; before the first there is nothing to go by,
  so a curve that begins below is said to have taken the first point's steps.
  """
  before = None
  for step, loss in curve:
    if loss <= target:
      if before is None:
        return float(step)
      share = (before[1] - target) / (before[1] - loss)
      return before[0] + share * (step - before[0])
    before = step, loss
  return None


def compared(row: Row, dense: Row) -> dict[str, float]:
  """What an arm has against the dense model of the same seed; nan: it has not.

  Returns:
    `final`, the last loss; `below`, that of the dense model less it; `steps`
    until that of the dense model is reached, `fewer`, the dense model's steps
    over them, and `wall` and `cores`, the dense model's time over theirs.
  """
  target, steps = dense['curve'][-1][1], dense['curve'][-1][0]
  final = row['curve'][-1][1]
  reached = steps_to(row['curve'], target)
  found = {'final': final, 'below': target - final}
  found['steps'] = np.nan if reached is None else reached
  found['fewer'] = steps / found['steps']
  for clock in ('wall', 'cores'):
    mine, theirs = row['milliseconds'][clock], dense['milliseconds'][clock]
    known = mine is not None and theirs is not None
    found[clock] = found['fewer'] * theirs / mine if known else np.nan
  return found


def by_seed(rows: Sequence[Row], arm: str) -> dict[int, Row]:
  """The rows of an arm."""
  return {row['seed']: row for row in rows if row['arm'] == arm}


def _cell(values: Sequence[float]) -> str:
  """An interval of those that there are; told if some are not."""
  real = [value for value in values if not np.isnan(value)]
  if not real:
    return 'never'
  missing = len(values) - len(real)
  return real_data.interval(real) + (f' (never: {missing})' if missing else '')


def losses(
  rows: Sequence[Row], arms: Sequence[str], dense: str
) -> Iterator[str]:
  """Lines of a Markdown table: losses, and what it takes to the dense one."""
  heads = (
    'final loss', 'below dense', "steps to dense's", 'times fewer',
    'times less time, clock', 'times less time, cores', 'seeds',
  )  # fmt: skip
  yield f'| arm | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  base = by_seed(rows, dense)
  for arm in arms:
    own = by_seed(rows, arm)
    pairs = [compared(own[s], base[s]) for s in sorted(own) if s in base]
    if not pairs:
      continue
    cells = [
      _cell([pair[name] for pair in pairs])
      for name in ('final', 'below', 'steps', 'fewer', 'wall', 'cores')
    ]
    if arm == dense:
      cells[1] = ''
    yield f'| {arm} | {" | ".join(cells)} | {len(pairs)} |'


def costs(rows: Sequence[Row], arms: Sequence[str]) -> Iterator[str]:
  """Lines of a Markdown table: sizes, times of a step, and routing."""
  heads = (
    'parameters', 'ms a step, clock', 'cores', 'pairs dropped',
    'tokens without an expert', 'entropy of loads', 'dead experts',
  )  # fmt: skip
  names = (
    'dropped_pairs', 'fraction_tokens_left_behind', 'load_entropy',
    'dead_experts',
  )  # fmt: skip
  yield f'| arm | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for arm in arms:
    own = list(by_seed(rows, arm).values())
    if not own:
      continue
    cells = [f'{own[0]["parameters"]:,}']
    for clock in ('wall', 'cores'):
      known = [r['milliseconds'][clock] for r in own]
      known = [value for value in known if value is not None]
      cells.append(f'{np.mean(known):.1f}' if known else '')
    for name in names:
      known = [r['routing'][name] for r in own if r['routing']]
      cells.append(f'{np.mean(known):.3f}' if known else '')
    yield f'| {arm} | {" | ".join(cells)} |'


def mean_curve(rows: Sequence[Row], arm: str) -> np.ndarray:
  """`<float64>[points, 2]`: steps and losses, the mean over seeds."""
  own = [row['curve'] for row in by_seed(rows, arm).values()]
  return np.mean(own, axis=0) if own else np.zeros((0, 2))


def draw(
  rows: Sequence[Row], groups: Mapping[str, Sequence[str]], path: Any
) -> None:
  """Writes loss curves as a PNG, one panel a group `{label: arms}`."""
  figure = figures.Figure(figsize=(6 * len(groups), 4.5))
  panels = figure.subplots(1, len(groups), squeeze=False)[0]
  for panel, (label, arms) in zip(panels, groups.items()):
    for arm in arms:
      curve = mean_curve(rows, arm)
      if len(curve):
        style = 'k--' if arm == arms[0] else '-'
        panel.plot(curve[:, 0], curve[:, 1], style, label=arm)
    panel.set(xlabel='step', ylabel=label)
    panel.legend(fontsize=8)
  figure.savefig(path, dpi=120, bbox_inches='tight')


def write(
  name: str, rows: Sequence[Row], arms: Sequence[str],
  dense: tuple[str, str], head: str,
) -> None:  # fmt: skip
  """Writes `results/NAME.md`, `.json` and `.png`, and prints the tables.

  Args:
    name: of the files.
    rows: of `switch.py`.
    arms: in the order of the tables.
    dense: the arm that language models are compared with, and that of models
      of masked tokens.
    head: what stands above the tables.
  """
  there = [arm for arm in arms if by_seed(rows, arm)]
  apart = arms.index(dense[1])
  groups = {
    'held-out bits per byte': [a for a in there if arms.index(a) < apart],
    'held-out nats a masked token': [
      a for a in there if arms.index(a) >= apart
    ],
  }
  groups = {label: own for label, own in groups.items() if own}
  lines = [
    f'Measured on {real_data.machine()}; `+-` is half of a 95% t interval.',
    '',
    *head.splitlines(),
    '',
    'Loss at the last step, and the first step at which the last loss of the '
    'dense model of the same seed is reached (between evaluations, on a line): '
    "the dense model's steps, and its time, over those of the arm. The row of "
    'the dense model tells how much of that is chance.',
  ]
  for label, own in groups.items():
    base = dense[0] if own[0] in arms[:apart] else dense[1]
    lines += ['', f'{label[0].upper()}{label[1:]}:', '']
    lines += losses(rows, own, base)
  lines += [
    '',
    'Times are medians over the spans between evaluations, without compilation. '
    'Routing is that of training batches of the last quarter of the steps; the '
    'entropy is over its largest value.',
    '',
    *costs(rows, there),
  ]
  text = '\n'.join(lines) + '\n'
  (real_data.RESULTS / f'{name}.md').write_text(text)
  draw(rows, groups, real_data.RESULTS / f'{name}.png')
  real_data.write(name, rows=sorted(rows, key=lambda r: (r['seed'], r['arm'])))
  print(text)
