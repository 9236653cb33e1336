# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of `adapter_transfer.py`, from its rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import adapter_transfer_arms as arms_lib
import adapter_transfer_data as data_lib
import adapter_transfer_merge as merge
import ext5_table
import numpy as np
import real_data


def column(task: str, shots: int) -> str:
  """What a result is of."""
  return f'{task}, {shots} shots'


def _columns(shots):
  return [column(task, shots) for task in data_lib.LEFT_OUT]


def _means(rows, arm, columns) -> dict[int, float]:
  """`{seed: mean of the columns}` of the seeds that have all of them."""
  found = ext5_table.complete(rows, arm, columns)
  return {seed: float(values.mean()) for seed, values in found.items()}


def _intervals(rows, arm, columns) -> list[str]:
  """An interval a column, and one of the mean; none if no seed is complete."""
  found = ext5_table.complete(rows, arm, columns)
  if not found:
    return []
  values = np.stack(list(found.values()))
  cells = [real_data.interval(own) for own in values.T]
  return [*cells, real_data.interval(values.mean(axis=1)), str(len(found))]


def accuracies(rows, arms: Sequence[str], shots: int) -> Iterator[str]:
  """Lines of a Markdown table: accuracy on every task that was left out."""
  heads = [*data_lib.LEFT_OUT, 'mean', 'seeds', 'numbers trained']
  yield f'| {shots} examples | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  trained = {row['arm']: row['trained'] for row in rows}
  for arm in arms:
    cells = _intervals(rows, arm, _columns(shots))
    if cells:
      yield f'| {arm} | {" | ".join(cells)} | {trained[arm]:,} |'


def claims(rows, pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, str]]:
  """`{'a above b': {shots: interval}}` of means over tasks, seed by seed."""
  found = {}
  every = {
    **{f'{n} examples': _columns(n) for n in arms_lib.SHOTS},
    'both': [c for n in arms_lib.SHOTS for c in _columns(n)],
  }
  for one, other in pairs:
    cells = {}
    for name, columns in every.items():
      a, b = (_means(rows, arm, columns) for arm in (one, other))
      differences = [a[seed] - b[seed] for seed in a if seed in b]
      cells[name] = real_data.interval(differences) if differences else ''
    if any(cells.values()):
      found[f'{one} above {other}'] = cells
  return found


def merges(rows) -> Iterator[str]:
  """Lines of a Markdown table: accuracy of merged experts on their tasks."""
  names = data_lib.MERGED
  heads = [*names, 'mean', 'seeds', 'scales']
  yield f'| merged by | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for way in (merge.NONE, *map(merge.expert, names), merge.OWN, *merge.WAYS):
    cells = _intervals(_with_own(rows), way, names)
    if not cells:
      continue
    scales = [
      f'{row["scale"]:g}'
      for row in rows
      if row['arm'] == way and 'scale' in row and row['task'] == names[0]
    ]
    yield f'| {way} | {" | ".join(cells)} | {", ".join(scales)} |'


def _with_own(rows):
  """The rows, and those of each expert on its own task under one name."""
  own = [
    {**row, 'arm': merge.OWN}
    for row in rows
    if row['arm'] == merge.expert(row['task'])
  ]
  return [*rows, *own]


def _grid(title, rows) -> Iterator[str]:
  """Lines of a Markdown table of cells with names."""
  heads = list(next(iter(rows.values()), {}))
  yield f'| {title} | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for row, cells in rows.items():
    yield f'| {row} | {" | ".join(cells.values())} |'


def write(name: str, run: Any, arms: Sequence[str], merging: Any) -> None:
  """Writes the tables and the rows behind them, and prints the tables."""
  rows = list(run.rows.found.values())
  merged = list(merging.rows.found.values())
  t = arms_lib
  compared = claims(rows, [
    (t.POLY_S, t.POLY), (t.POLY, t.SHARED), (t.POLY_S, t.SHARED),
    (t.POLY_MU, t.POLY_S), (t.POLY_MU, t.SHARED), (t.SHARED, t.SINGLE),
    (t.SPOT, t.TUNING), (t.ATTEMPT, t.TUNING), (t.ATTEMPT, t.SPOT),
    (t.IA3, t.IA3_LM), (t.IA3, t.SHARED), (t.SHARED, t.FULL),
  ])  # fmt: skip
  steps = ', '.join(f'{n} {count}' for n, count in run.steps.items())
  lines = [
    f'Measured on {ext5_table.machine()}; `+-` is half of a 95% t interval.', '',
    f'Steps: {steps}. Rates: {_told(t.RATES)}; of logits {t.ROUTER_RATE:g}.', '',
  ]  # fmt: skip
  if any(row['arm'] in t.ARMS for row in rows):
    lines += [
      'Accuracy of rank classification on tasks left out, at most '
      f'{data_lib.MOST["test"]} test rows each.', '',
    ]  # fmt: skip
    for shots in t.SHOTS:
      lines += [*accuracies(rows, arms, shots), '']
    lines += [
      'Differences of means over the four tasks, seed by seed.', '',
      *_grid('claim', compared), '',
    ]  # fmt: skip
  lines += [
    'Four LoRA experts merged: accuracy on their tasks.', '',
    *merges(merged),
  ]  # fmt: skip
  text = '\n'.join(lines) + '\n'
  (real_data.RESULTS / f'{name}.md').write_text(text)
  real_data.write(
    name, steps=run.steps, rates=t.RATES, claims=compared, rows=rows,
    merged=merged, tried=list(run.rates.found.values()),
  )  # fmt: skip
  print(text)


def _told(rates) -> str:
  return ', '.join(f'{kind} {rate:g}' for kind, rate in rates.items())
