# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of `ext5.py`, from its rows."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
import platform

import numpy as np
import real_data

Row = Mapping[str, object]
Accuracies = dict[int, np.ndarray]


def complete(rows: Sequence[Row], arm: str, tasks: Sequence[str]) -> Accuracies:
  """`{seed: <float64>[tasks]}` of the seeds that have every task."""
  found: dict[int, dict[str, float]] = {}
  for row in rows:
    if row['arm'] == arm and row['task'] in tasks:
      found.setdefault(row['seed'], {})[row['task']] = row['accuracy']
  return {
    seed: np.array([scores[task] for task in tasks])
    for seed, scores in sorted(found.items())
    if len(scores) == len(tasks)
  }


def accuracies(
  rows: Sequence[Row], arms: Sequence[str], tasks: Sequence[str],
  new: Sequence[str], to: str,
) -> Iterator[str]:  # fmt: skip
  """Lines of a Markdown table: accuracies, and differences of their means.

  Args:
    rows: from `ext5.py`.
    arms: rows of the table, if a seed of them is complete.
    tasks: columns.
    new: those of families that the mixture does not have.
    to: the arm that the others are compared with, seed by seed.
  """
  is_new = np.isin(tasks, new)
  base = complete(rows, to, tasks)
  heads = [*tasks, 'mean of new families', f'mean of all, above {to}', 'seeds']
  yield f'| fine-tuned after | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for arm in arms:
    found = complete(rows, arm, tasks)
    if not found:
      continue
    values = np.stack(list(found.values()))
    pairs = [s.mean() - base[n].mean() for n, s in found.items() if n in base]
    cells = [real_data.interval(column) for column in values.T]
    cells.append(real_data.interval(values[:, is_new].mean(axis=1)))
    cells.append(real_data.interval(pairs) if pairs and arm != to else '')
    yield f'| {arm} | {" | ".join(cells)} | {len(found)} |'


def pretraining(rows: Sequence[Row], arms: Sequence[str]) -> Iterator[str]:
  """Lines of a Markdown table: what was drawn and how well it was learned."""
  heads = ('examples of denoising', 'of tasks', 'loss of denoising', 'of tasks')
  words = ('denoising drawn', 'tasks drawn', 'denoising loss', 'tasks loss')
  yield f'| pre-trained on | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for arm in arms:
    mine = [r for r in rows if r['arm'] == arm and r['task'] == '']
    if not mine:
      continue
    cells = []
    for word in words:
      values = [row[word] for row in mine if row[word] is not None]
      drawn = word.endswith('drawn')
      cells.append(
        f'{np.mean(values):,.0f}' if drawn else
        real_data.interval(values) if values else ''
      )  # fmt: skip
    yield f'| {arm} | {" | ".join(cells)} |'


def machine() -> str:
  """What the numbers come from."""
  packages = ('flax', 'optax', 'seqio')
  versions = ', '.join(f'{n} {metadata.version(n)}' for n in packages)
  return (
    f'{real_data.machine()}, {versions}, Python {platform.python_version()}, '
    f'one core of {platform.machine()}'
  )
