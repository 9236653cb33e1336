# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training run tells and asks while it runs.

A callback is told of steps, logged metrics and saved states; it may give back
numbers to be logged. Those of an evaluation are called `eval/...`.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import numpy as np
import tqdm

from mergejax.core import files
from mergejax.training import run as run_lib
from mergejax.training import state as state_lib

Metrics = Mapping[str, np.ndarray]
# Names of the metrics of an evaluation begin so.
EVAL = 'eval/'


class Callback:
  """Does nothing; override what is of interest.

  Attributes:
    everywhere: whether every process of several calls it, as anything must
      that computes with the parameters; others are called by the first alone.
  """

  everywhere = True

  def on_start(self, run: run_lib.Run) -> None:
    """The run begins, or goes on."""

  def on_step(
    self, step: int, state: state_lib.TrainState
  ) -> Mapping[str, Any] | None:
    """A step was made; numbers that come back are logged.

    The arrays of the state are overwritten by the next step: copy what is to
    be kept.
    """

  def on_log(self, step: int, metrics: Metrics) -> None:
    """Metrics in host memory; those of experts have a leading axis."""

  def on_save(self, step: int, state: state_lib.TrainState) -> None:
    """A checkpoint of the step is being written."""

  def close(self) -> None:
    """The run ended, or failed."""


class on_log(Callback):  # pylint: disable=invalid-name
  """A function `(step, metrics)` as a callback."""

  def __init__(self, fn: Callable[[int, Metrics], None]):
    self._fn = fn

  def on_log(self, step, metrics):
    self._fn(step, metrics)


def scalars(
  metrics: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> dict[str, float]:
  """Flattens metrics: those of experts become `name/expert`.

  Args:
    metrics: arrays of shape `[]`, or `[experts]`. Those of a batch without a
      token are left out: there the 0 of a loss is no measurement. Those of more
      axes are tables, to be drawn, and left out too.
    names: names of the experts.
  """
  flat = {}
  for key, value in metrics.items():
    value = np.asarray(value)
    if value.ndim > 1:
      continue
    measured = key == 'tokens' or key.startswith(EVAL)
    real = np.broadcast_to(_learned(metrics) | measured, value.shape)
    if value.ndim == 0:
      if real:
        flat[key] = float(value)
    else:
      for i, one in enumerate(value.reshape(-1)):
        if real.reshape(-1)[i]:
          flat[f'{key}/{names[i] if names else i}'] = float(one)
  return flat


def _learned(metrics) -> np.ndarray:
  """`<bool>[]` or `[experts]`: whether the batch had a token to learn from."""
  return np.asarray(metrics.get('tokens', 1.0)) > 0


def _mean_loss(metrics) -> float | None:
  """The mean over experts, of those that learned; None if none did."""
  losses = np.asarray(metrics.get('loss', ()))
  if losses.size:
    losses = losses[np.broadcast_to(_learned(metrics), losses.shape)]
  return float(np.mean(losses)) if losses.size else None


class progress(Callback):  # pylint: disable=invalid-name
  """Shows phase, loss and time left: a bar on a terminal, else plain lines."""

  everywhere = False

  def __init__(self, stream: TextIO | None = None):
    """Writes to a stream; standard error by default."""
    self._stream = stream or sys.stderr
    self._bar = None

  def on_start(self, run):
    self._phase, self._steps = run.phase, run.steps
    self._started, self._first, self._shown = time.monotonic(), None, 0.0
    if self._stream.isatty():
      self._bar = tqdm.tqdm(
        total=run.steps, desc=run.phase, file=self._stream, leave=True
      )

  def on_log(self, step, metrics):
    if 'loss' not in metrics:
      return
    if self._bar is not None:
      self._on_terminal(step, metrics)
    else:
      self._on_file(step, metrics)

  def close(self):
    if self._bar is not None:
      self._bar.close()

  def _on_terminal(self, step, metrics):
    loss = _mean_loss(metrics)
    if loss is not None:
      self._bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
    self._bar.update(step - self._bar.n)

  def _on_file(self, step, metrics):
    now = time.monotonic()
    first = self._first = step if self._first is None else self._first
    if now - self._shown < 10 and step < self._steps:
      return
    self._shown = now
    loss = _mean_loss(metrics)
    said = 'no token to learn from: skipped'
    if loss is not None:
      said = f'loss {loss:.3f}'
    line = f'{self._phase}: step {step}/{self._steps}, {said}'
    if first < step < self._steps:
      left = (now - self._started) / (step - first) * (self._steps - step)
      line += f', {left:.0f} s left'
    self._stream.write(line + '\n')
    self._stream.flush()


class jsonl(Callback):  # pylint: disable=invalid-name
  """Appends one JSON object a call: `{"step": 10, "loss": 2.3, ...}`.

  A run that continues from an earlier step first drops the lines beyond it, so
  that every step stands in the file once.
  """

  everywhere = False

  def __init__(self, path: os.PathLike | str | None = None):
    """Writes to a file; `metrics.jsonl` of the run's folder by default."""
    self._given = None if path is None else pathlib.Path(path)
    self._path, self._fresh, self._names = self._given, True, None

  def on_start(self, run):
    self._names = run.experts
    self._path = self._given or run.folder('jsonl') / 'metrics.jsonl'
    self._fresh = True

  def on_log(self, step, metrics):
    path = self._path
    path.parent.mkdir(parents=True, exist_ok=True)
    if self._fresh and path.exists():
      lines = path.read_text().splitlines(keepends=True)
      kept = [
        line
        for line in lines
        if line.endswith('\n') and json.loads(line)['step'] < step
      ]
      with files.atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(''.join(kept))
    self._fresh = False
    with open(path, 'a', encoding='utf-8') as file:
      row = {'step': step, **scalars(metrics, self._names)}
      file.write(json.dumps(row) + '\n')


class tensorboard(Callback):  # pylint: disable=invalid-name
  """Writes every metric as a scalar of TensorBoard, through clu."""

  everywhere = False

  def __init__(self, directory: os.PathLike | str | None = None):
    """Writes into a folder; `events` of the run's folder by default."""
    self._directory = directory

  def on_start(self, run):
    from clu import metric_writers  # pylint: disable=import-outside-toplevel

    self._names = run.experts
    folder = self._directory or run.folder('tensorboard') / 'events'
    self._writer = metric_writers.SummaryWriter(os.fspath(folder))

  def on_log(self, step, metrics):
    self._writer.write_scalars(step, scalars(metrics, self._names))
    self._writer.flush()
