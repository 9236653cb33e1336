# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of how much the experts of sparse layers are used."""

from collections.abc import Sequence
import os
import sys
from typing import Any

import numpy as np

from mergejax import models
from mergejax.core import files
from mergejax.nn import moe_metrics
from mergejax.training import callbacks

PICTURE = 'routing.png'


def figure(loads: np.ndarray, layers: Sequence[str]) -> Any:
  """A heat map: the load of every expert of every sparse layer.

  A fair share is white, red is more and blue is less, to a hundredth of it and
  a hundredfold at most; what is never used is black.

  Args:
    loads: `<float>[layers, experts]`, shares of the kept pairs of a layer.
    layers: their names.

  Returns:
    A figure of matplotlib.
  """
  # It takes a second, and is an extra.
  from matplotlib import figure as figures  # pylint: disable=import-outside-toplevel

  loads = np.asarray(loads, np.float64)
  count, experts = loads.shape
  made = figures.Figure(
    figsize=(2.5 + min(0.25 * experts, 12), 1.2 + min(0.3 * count, 12))
  )
  axes = made.add_subplot()
  axes.set_facecolor('black')
  fair = np.ma.log2(np.ma.masked_equal(loads, 0) * experts)
  limit = max(1.0, min(float(np.abs(fair).max() or 0), np.log2(100)))
  image = axes.imshow(
    fair, cmap='RdBu_r', vmin=-limit, vmax=limit, aspect='auto'
  )
  axes.set_yticks(range(count), layers, fontsize=7)
  axes.set(xlabel='expert')
  made.colorbar(image, label='log2 of the load over a fair share')
  return made


def draw(
  loads: np.ndarray, layers: Sequence[str], path: os.PathLike | str
) -> None:
  """Writes `figure` as a PNG, whole or not at all."""
  with files.atomic_path(path, overwrite=True) as temporary:
    figure(loads, layers).savefig(
      temporary, format='png', dpi=120, bbox_inches='tight'
    )


def pixels(loads: np.ndarray, layers: Sequence[str]) -> np.ndarray:
  """`figure` as `<uint8>[height, width, 3]`."""
  from matplotlib.backends import backend_agg  # pylint: disable=import-outside-toplevel

  made = figure(loads, layers)
  made.set_layout_engine('tight')
  canvas = backend_agg.FigureCanvasAgg(made)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3]


class routing(callbacks.Callback):  # pylint: disable=invalid-name
  """Draws the loads of the experts of a sparse model, whenever it is saved.

  `routing.png` in the run's folder is that of the newest step; TensorBoard has
  one for every saved step, under `routing`. Models that train side by side have
  one each. Of a dense model it does nothing.
  """

  everywhere = False

  def __init__(self, directory: os.PathLike | str | None = None):
    """Writes events into a folder; `events` of the run's by default."""
    self._directory = directory

  def on_start(self, run):
    self._writer, self._loads = None, None
    if getattr(run.family, 'moe', None) is None:
      return
    try:
      import matplotlib  # noqa: F401  pylint: disable=import-outside-toplevel,unused-import
    except ImportError:
      print(
        "No pictures of the routing: pip install 'mergejax[plots]' to have them.",
        file=sys.stderr,
      )
      return
    from clu import metric_writers  # pylint: disable=import-outside-toplevel

    self._folder = run.folder('routing')
    self._names, self._layers = run.experts, layers_of(run.family)
    events = self._directory or self._folder / 'events'
    self._writer = metric_writers.SummaryWriter(os.fspath(events))

  def on_log(self, step, metrics):
    if moe_metrics.LOADS in metrics:
      self._loads = step, np.asarray(metrics[moe_metrics.LOADS])

  def on_save(self, step, state):
    if self._writer is None or self._loads is None:
      return
    step, loads = self._loads  # of the newest step that was logged
    each = {'': loads} if loads.ndim == 2 else dict(zip(self._names, loads))
    for name, own in each.items():
      label = f'routing/{name}' if name else 'routing'
      self._writer.write_images(step, {label: pixels(own, self._layers)[None]})
      file = f'routing_{name}.png' if name else PICTURE
      draw(own, self._layers, self._folder / file)
    self._writer.flush()

  def close(self):
    if getattr(self, '_writer', None) is not None:
      self._writer.close()


def layers_of(family: models.ModelFamily) -> list[str]:
  """Names of the sparse layers, in the order of the metric of their loads."""
  found = {}
  for path, spec in family.specs().items():
    layer, between, _ = path.partition('/mlp/expert/')
    if between:
      axes = list(spec.axes or ())
      count = spec.shape[axes.index('layers')] if 'layers' in axes else 0
      found[layer] = count
  names = []
  for layer in sorted(found, key=moe_metrics.by_number):
    count = found[layer]
    stack = layer.partition('/')[0]
    names += [f'{stack}/layers_{i}' for i in range(count)] or [layer]
  return names
