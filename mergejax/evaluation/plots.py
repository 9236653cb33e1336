# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of tables, curves and planes, as PNG files."""

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

from matplotlib import figure as figures
import numpy as np

from mergejax.core import errors
from mergejax.evaluation import base


def heatmap(table: base.Table, reference: str, path: os.PathLike | str) -> None:
  """Writes a heat map: bits per byte saved against a reference model.

  Args:
    table: models by domains.
    reference: the row that the others are compared with.
    path: the PNG file to write.
  """
  values = _values(table)
  saved = values[list(table).index(reference)] - values
  limit = np.abs(saved).max() or 1.0
  figure = figures.Figure(
    figsize=(1.5 + 1.1 * len(table.tasks), 1.2 + 0.42 * len(table))
  )
  axes = figure.add_subplot()
  dark = np.abs(saved) > 0.6 * limit
  image = axes.imshow(
    saved, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto'
  )
  _label_cells(axes, table, '{:.2f}', np.where(dark, 'white', 'black'), size=8)
  axes.set_title('bits per byte (colour: saved against the ' + reference + ')')
  figure.colorbar(image)
  _save(figure, path)


def _save(figure: figures.Figure, path: os.PathLike | str) -> None:
  figure.savefig(path, dpi=120, bbox_inches='tight')


def _values(table):
  """`<float64>[models, tasks]`."""
  return np.array(
    [[row[task].value for task in table.tasks] for row in table.values()]
  )


def _label_cells(axes, table, text, colours, *, size):
  """Names of models and tasks at the sides, the values in the cells."""
  tasks = table.tasks
  axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha='right')
  axes.set_yticks(range(len(table)), list(table))
  for (row, column), value in np.ndenumerate(_values(table)):
    axes.text(
        column, row, text.format(value), ha='center', va='center',
        fontsize=size, color=colours[row, column],
    )  # fmt: skip


def lines(
  curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
  path: os.PathLike | str,
  *,
  name: str = 'loss',
) -> None:
  """Writes curves between models, one a label, as a PNG.

  Args:
    curves: `{label: (lambdas <float>[points], values <float>[points])}`.
    path: the file.
    name: what the values are.
  """
  figure = figures.Figure(figsize=(5, 3.5))
  axes = figure.add_subplot()
  for label, (lambdas, values) in curves.items():
    axes.plot(lambdas, values, marker='.', label=label)
  axes.set(xlabel='lambda', ylabel=name)
  axes.legend()
  _save(figure, path)


def plane(
  x: np.ndarray,
  y: np.ndarray,
  values: np.ndarray,
  corners: np.ndarray,
  path: os.PathLike | str,
  *,
  name: str = 'loss',
) -> None:
  """Writes the plane through three models as a contour PNG.

  Args:
    x: <float>[columns].
    y: <float>[rows].
    values: <float>[rows, columns].
    corners: <float>[3, 2], where the three models lie.
    path: the file.
    name: what the values are.
  """
  figure = figures.Figure(figsize=(5, 4))
  axes = figure.add_subplot()
  filled = axes.contourf(x, y, values, levels=20)
  axes.scatter(*corners.T, color='white', edgecolor='black')
  for corner, label in zip(corners, 'abc'):
    axes.annotate(label, corner)
  figure.colorbar(filled, label=name)
  _save(figure, path)


def search(
  points: Sequence[Sequence[float]],
  objectives: Sequence[float],
  names: Sequence[str],
  path: os.PathLike | str,
) -> None:
  """Writes the objective against each coefficient as a PNG.

  Args:
    points: coefficients of every candidate, one for each name.
    objectives: what the search maximised, of every candidate.
    names: of the coefficients; the first eight are drawn.
    path: the file.
  """
  columns = np.array(points).T
  best = int(np.argmax(objectives))
  count = min(len(names), 8)
  figure = figures.Figure(figsize=(2.6 * count + 0.8, 3))
  for i in range(count):
    axes = figure.add_subplot(1, count, i + 1)
    axes.scatter(columns[i], objectives, s=12)
    axes.scatter([columns[i][best]], [objectives[best]])
    axes.set(xlabel=names[i], ylabel='' if i else 'objective')
  _save(figure, path)


def norms(rows: Sequence[Mapping[str, Any]], path: os.PathLike | str) -> None:
  """Writes a survey: relative size, cosine and sign agreement of each leaf.

  Args:
    rows: of `Survey.to_rows`, one a leaf.
    path: the file.
  """
  figure = figures.Figure(figsize=(8, 1.2 + 0.16 * len(rows)))
  size = lambda row: np.mean([norm or 0.0 for norm in row['relative_norms']])
  for i, (title, value) in enumerate((
    ('|task vector| / |base|', size),
    ('mean cosine', lambda row: row['mean_cosine']),
    ('signs agree', lambda row: row['sign_agreement']),
  )):  # fmt: skip
    axes = figure.add_subplot(1, 3, i + 1)
    axes.barh(range(len(rows)), [value(row) for row in rows])
    axes.set_yticks(
      range(len(rows)),
      [row['path'] for row in rows] if not i else [],
      fontsize=5,
    )
    axes.invert_yaxis()
    axes.set_title(title, fontsize=8)
  _save(figure, path)


def table(
  scores: base.Table, path: os.PathLike | str, kind: str = 'heatmap'
) -> None:
  """Writes a table of models by tasks as a PNG.

  Args:
    scores: raw or normalised scores.
    path: the file.
    kind: one of `KINDS`.

  Raises:
    ConfigError: an unknown kind.
  """
  if kind not in KINDS:
    raise errors.ConfigError(errors.near(kind, KINDS, 'kind of picture'))
  _save(KINDS[kind](scores), path)


def _heatmap(scores):
  figure = figures.Figure(
    figsize=(2 + 0.9 * len(scores.tasks), 1.2 + 0.35 * len(scores))
  )
  axes = figure.add_subplot()
  values = _values(scores)
  axes.imshow(values, cmap='viridis', aspect='auto')
  white = np.full(values.shape, 'white')
  _label_cells(axes, scores, '{:.3g}', white, size=7)
  return figure


def _bars(scores):
  tasks = scores.tasks
  figure = figures.Figure(figsize=(2 + 1.2 * len(tasks), 3.5))
  axes = figure.add_subplot()
  width = 0.8 / len(scores)
  for i, (model, row) in enumerate(scores.items()):
    values = np.array([row[task].value for task in tasks])
    low = values - [row[task].low for task in tasks]
    high = [row[task].high for task in tasks] - values
    axes.bar(
      np.arange(len(tasks)) + i * width, values, width, label=model,
      yerr=np.maximum([low, high], 0),
    )  # fmt: skip
  axes.set_xticks(np.arange(len(tasks)) + 0.4, tasks, rotation=30, ha='right')
  axes.legend(fontsize=6)
  return figure


def _radar(scores):
  figure = figures.Figure(figsize=(5, 5))
  axes = figure.add_subplot(projection='polar')
  angles = np.linspace(0, 2 * np.pi, len(scores.tasks), endpoint=False)
  for model, values in zip(scores, _values(scores)):
    axes.plot([*angles, angles[0]], [*values, values[0]], label=model)
  axes.set_xticks(angles, scores.tasks)
  axes.legend(fontsize=6, loc='lower right')
  return figure


# What `table` draws, by name.
KINDS: dict[str, Callable[[base.Table], figures.Figure]] = {
  'heatmap': _heatmap,
  'bar': _bars,
  'radar': _radar,
}
