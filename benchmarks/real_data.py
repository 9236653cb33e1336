# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks on real data share: seeds, intervals, tables, records."""

import argparse
from collections.abc import Callable, Mapping
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np
from scipy import stats

RESULTS = pathlib.Path(__file__).parent / 'results'


def cache_folder() -> pathlib.Path:
  """Where trained models are kept between runs."""
  root = os.environ.get('XDG_CACHE_HOME', '~/.cache')
  return pathlib.Path(root).expanduser() / 'mergejax' / 'benchmarks'


def parser() -> argparse.ArgumentParser:
  """A parser with `--seeds`."""
  result = argparse.ArgumentParser()
  result.add_argument('--seeds', type=int, default=3)
  return result


def over_seeds(
  run: Callable[[int], Mapping[str, Any]], seeds: int
) -> list[Mapping[str, Any]]:
  """`run(seed)` for every seed, printed as they come."""
  found = []
  for seed in range(seeds):
    found.append(run(seed))
    print(f'seed {seed}: {json.dumps(found[-1])}', flush=True)
  return found


def interval(values) -> str:
  """`mean +- half-width` of a 95% t interval over seeds."""
  values = np.asarray(values, np.float64)
  if np.isnan(values).all():
    return ''
  count = len(values)
  if count < 2:
    return f'{values.mean():.3f}'
  half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
  return f'{values.mean():.3f} +- {half:.3f}'


def summary(
  runs: list[Mapping[str, Mapping[str, float]]], *, mean: bool = False
) -> dict[str, dict[str, str]]:
  """Intervals of `{row: {column: value}}` over runs, with a mean column."""
  rows = {}
  for row in runs[0]:
    columns = list(runs[0][row])
    rows[row] = {c: interval([r[row][c] for r in runs]) for c in columns}
    if mean:
      rows[row]['mean'] = interval(
        [np.mean(list(r[row].values())) for r in runs]
      )
  return rows


def show(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
  """Prints a Markdown table."""
  columns = list(next(iter(rows.values())))
  print(f'\n| {title} | ' + ' | '.join(columns) + ' |')
  print('|---' * (len(columns) + 1) + '|')
  for row, own in rows.items():
    print(f'| {row} | ' + ' | '.join(own[c] for c in columns) + ' |')


def machine() -> str:
  """The device and the version of JAX."""
  return f'{jax.devices()[0].device_kind}, jax {jax.__version__}'


def write(name: str, **record: Any) -> None:
  """Writes `results/NAME.json`, with the machine, and prints it."""
  if jax.default_backend() != 'cpu':
    name += f'_{jax.default_backend()}'
  record = {'machine': machine(), **record}
  (RESULTS / f'{name}.json').write_text(json.dumps(record, indent=2) + '\n')
  print(json.dumps(record))


class Rows:
  """Results, one a line of a file, by what they are of."""

  def __init__(self, path: pathlib.Path):
    self._path, self.found = path, {}
    if path.exists():
      for line in path.read_text().splitlines():
        row = json.loads(line)
        self.found[row['seed'], row['arm'], row['task']] = row

  def once(self, seed: int, arm: str, task: str, make) -> None:
    """Makes a result, unless it is there, and keeps it."""
    if (seed, arm, task) in self.found:
      return
    begin = time.process_time()
    row = {'seed': seed, 'arm': arm, 'task': task, **make()}
    row['seconds'] = round(time.process_time() - begin, 1)
    self.found[seed, arm, task] = row
    with open(self._path, 'a') as out:
      out.write(json.dumps(row) + '\n')
    print(json.dumps(row), flush=True)
