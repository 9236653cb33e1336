# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of tables, curves and planes, as PNG files."""

from collections.abc import Mapping, Sequence
import os
from typing import Any

import matplotlib
from matplotlib import figure as figures
import numpy as np

from mergejax.evaluation import base


def heatmap(table: base.Table, reference: str, path: os.PathLike | str) -> None:
  """Writes a heat map: bits per byte saved against a reference model.

  Args:
    table: models by domains.
    reference: the row that the others are compared with.
    path: the PNG file to write.
  """
  matplotlib.use('Agg')
  from matplotlib import pyplot  # after the backend is chosen

  models, domains = list(table), list(table[reference])
  values = np.array([[table[m][d].value for d in domains] for m in models])
  saved = values[models.index(reference)] - values
  limit = np.abs(saved).max() or 1.0
  figure, axes = pyplot.subplots(
    figsize=(1.5 + 1.1 * len(domains), 1.2 + 0.42 * len(models))
  )
  image = axes.imshow(
    saved, cmap='RdBu', vmin=-limit, vmax=limit, aspect='auto'
  )
  axes.set_xticks(range(len(domains)), domains, rotation=30, ha='right')
  axes.set_yticks(range(len(models)), models)
  for (row, column), value in np.ndenumerate(values):
    dark = abs(saved[row, column]) > 0.6 * limit
    axes.text(
        column, row, f'{value:.2f}', ha='center', va='center', fontsize=8,
        color='white' if dark else 'black',
    )  # fmt: skip
  axes.set_title('bits per byte (colour: saved against the ' + reference + ')')
  figure.colorbar(image)
  figure.savefig(path, dpi=120, bbox_inches='tight')
  pyplot.close(figure)


def _save(figure: figures.Figure, path: os.PathLike | str) -> None:
  figure.savefig(path, dpi=120, bbox_inches='tight')


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
  for i, (title, value) in enumerate((
    ('|task vector| / |base|', lambda r: np.mean([n or 0.0 for n in r['relative_norms']])),
    ('mean cosine', lambda r: r['mean_cosine']),
    ('signs agree', lambda r: r['sign_agreement']),
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
    kind: 'heatmap', 'bar' or 'radar'.
  """
  models, tasks = list(scores), list(next(iter(scores.values())))
  values = np.array([[scores[m][t].value for t in tasks] for m in models])
  if kind == 'heatmap':
    figure = figures.Figure(
      figsize=(2 + 0.9 * len(tasks), 1.2 + 0.35 * len(models))
    )
    axes = figure.add_subplot()
    axes.imshow(values, cmap='viridis', aspect='auto')
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha='right')
    axes.set_yticks(range(len(models)), models)
    for (row, column), value in np.ndenumerate(values):
      axes.text(column, row, f'{value:.3g}', ha='center', va='center',
                fontsize=7, color='white')  # fmt: skip
  elif kind == 'bar':
    figure = figures.Figure(figsize=(2 + 1.2 * len(tasks), 3.5))
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for i, model in enumerate(models):
      low = [values[i, t] - scores[model][n].low for t, n in enumerate(tasks)]
      high = [scores[model][n].high - values[i, t] for t, n in enumerate(tasks)]
      axes.bar(
        np.arange(len(tasks)) + i * width, values[i], width, label=model,
        yerr=np.maximum([low, high], 0),
      )  # fmt: skip
    axes.set_xticks(np.arange(len(tasks)) + 0.4, tasks, rotation=30, ha='right')
    axes.legend(fontsize=6)
  else:
    figure = figures.Figure(figsize=(5, 5))
    axes = figure.add_subplot(projection='polar')
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    for i, model in enumerate(models):
      axes.plot([*angles, angles[0]], [*values[i], values[i, 0]], label=model)
    axes.set_xticks(angles, tasks)
    axes.legend(fontsize=6, loc='lower right')
  _save(figure, path)
