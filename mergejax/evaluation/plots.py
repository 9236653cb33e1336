# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a table."""

import os

import matplotlib
import numpy as np

from mergejax.evaluation import report


def heatmap(
  table: report.Table, reference: str, path: os.PathLike | str
) -> None:
  """Writes a heat map: bits per byte saved against a reference model.

  Args:
    table: models by domains.
    reference: the row that the others are compared with.
    path: the PNG file to write.
  """
  matplotlib.use('Agg')
  from matplotlib import pyplot  # after the backend is chosen

  models, domains = list(table), list(table[reference])
  values = np.array(
    [[table[m][d].bits_per_byte for d in domains] for m in models]
  )
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
