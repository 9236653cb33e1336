# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Hooks of the training loop: progress on the terminal, metrics as JSON lines."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import sys
import time

import numpy as np
import tqdm

from mergejax.checkpoints import base
from mergejax.training import loop


def scalars(
  metrics: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> dict[str, float]:
  """Flattens metrics: those of experts become `name/expert`.

  Args:
    metrics: arrays of shape `[]`, or `[experts]`. Those of a batch without a
      token are left out: there the 0 of a loss is no measurement.
    names: names of the experts.
  """
  flat = {}
  for key, value in metrics.items():
    value = np.asarray(value)
    real = np.broadcast_to(_learned(metrics) | (key == 'tokens'), value.shape)
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
  losses = np.asarray(metrics['loss'])
  losses = losses[np.broadcast_to(_learned(metrics), losses.shape)]
  return float(np.mean(losses)) if losses.size else None


def progress(phase: str, steps: int, stream=None) -> loop.Hook:
  """Shows phase, loss and time left: a bar on a terminal, else plain lines.

  Args:
    phase: what is being trained.
    steps: the step number at which the bar is full.
    stream: where to write; standard error by default.
  """
  stream = stream or sys.stderr
  if stream.isatty():
    bar = tqdm.tqdm(total=steps, desc=phase, file=stream, leave=True)

    def on_terminal(step, metrics):
      loss = _mean_loss(metrics)
      if loss is not None:
        bar.set_postfix(loss=f'{loss:.3f}', refresh=False)
      bar.update(step - bar.n)
      if step >= steps:
        bar.close()

    return on_terminal
  started, first, shown = time.monotonic(), None, 0.0

  def on_file(step, metrics):
    nonlocal first, shown
    now = time.monotonic()
    first = step if first is None else first
    if now - shown < 10 and step < steps:
      return
    shown = now
    loss = _mean_loss(metrics)
    said = 'no token to learn from: skipped'
    if loss is not None:
      said = f'loss {loss:.3f}'
    line = f'{phase}: step {step}/{steps}, {said}'
    if first < step < steps:
      left = (now - started) / (step - first) * (steps - step)
      line += f', {left:.0f} s left'
    stream.write(line + '\n')
    stream.flush()

  return on_file


def jsonl(
  path: os.PathLike | str, names: Sequence[str] | None = None
) -> loop.Hook:
  """Appends one JSON object a call: `{"step": 10, "loss": 2.3, ...}`.

  A run that continues from an earlier step first drops the lines beyond it, so
  that every step stands in the file once.

  Args:
    path: the file.
    names: names of the experts, see `scalars`.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = True

  def write(step, metrics):
    nonlocal fresh
    if fresh and path.exists():
      lines = path.read_text().splitlines(keepends=True)
      kept = [
        line
        for line in lines
        if line.endswith('\n') and json.loads(line)['step'] < step
      ]
      with base.atomic_path(path, overwrite=True) as temporary:
        temporary.write_text(''.join(kept))
    fresh = False
    with open(path, 'a', encoding='utf-8') as file:
      row = {'step': step, **scalars(metrics, names)}
      file.write(json.dumps(row) + '\n')

  return write
