# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, hooks, checkpoints, exact resume, clean stop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mergejax import partition
from mergejax.core import errors
from mergejax.core import stop as stop_lib
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import step as step_lib
from mergejax.training import streams

# (step, metrics in host memory); metrics of experts have a leading axis.
Hook = Callable[[int, Mapping[str, np.ndarray]], None]


class Stream(Protocol):
  """Training batches with a position; see also `streams.restore`."""

  def __next__(self) -> Any: ...

  def state(self) -> bytes: ...

  def restore(self, state: bytes) -> None: ...


def fit(
  step_fn: step_lib.StepFn,
  state: step_lib.TrainState,
  stream: Stream,
  *,
  steps: int,
  checkpoints: checkpoints_lib.Checkpoints | None = None,
  save_every: int = 1000,
  log_every: int = 10,
  hooks: Sequence[Hook] = (),
  place: Callable[[Any], Any] = lambda batch: batch,
) -> step_lib.TrainState:
  """Trains until `steps`, from the newest checkpoint if there is one.

  A run that is killed and started again ends with the same bits as one that
  was not: state and data position are saved together, and every random number
  depends on the key and the step alone.

  Args:
    step_fn: a compiled step; its state argument may be donated.
    state: where to begin when there is no checkpoint.
    stream: the data, see `Stream`.
    steps: the step number to reach.
    checkpoints: where to save; None saves nothing.
    save_every: steps between checkpoints; the last step is always saved.
    log_every: steps between calls of the hooks. In between nothing waits for
      the device.
    hooks: called with the step and its metrics.
    place: puts a batch of the stream on the devices.

  Returns:
    The state after `steps` steps.

  Raises:
    errors.Stopped: SIGTERM came; the state is saved.
    UserError: a checkpoint could not be written or does not fit, the run is
      beyond the last step already, or a number of steps is none.
  """
  for name, number, least in (
    ('steps', steps, 0), ('save_every', save_every, 1), ('log_every', log_every, 1),
  ):  # fmt: skip
    if not isinstance(number, (int, np.integer)) or number < least:
      raise errors.ConfigError(
        f'{name} must be a whole number of {least} or more, not {number!r}.'
      )
  if checkpoints is not None and checkpoints.latest() is not None:
    state, positions = checkpoints.restore(state)
    streams.restore(stream, positions)
  step = step_lib.step_number(state)
  if step > steps:
    raise errors.ConfigError(
      f'This run has made {step} steps already, more than the {steps} asked '
      'for, and an earlier step is not kept: name another folder, or ask for '
      f'at least {step}.'
    )
  with stop_lib.StopRequest() as stop:
    while step < steps:
      state, metrics = step_fn(state, place(next(stream)))
      step += 1
      log = step == steps or step % log_every == 0
      if log:
        # Fetched by every process, whether it has hooks or not: the metrics of
        # experts are spread over all of them.
        metrics = partition.to_host(metrics)
        for hook in hooks:
          hook(step, metrics)
      stopping = stop.agreed(may_wait=log)
      save = stopping or step == steps or step % save_every == 0
      if checkpoints is not None and save:
        checkpoints.save(state, stream.state())
      if stopping:
        if checkpoints is not None:
          checkpoints.wait()
        raise errors.Stopped(f'Stopped at step {step} of {steps}.')
  if checkpoints is not None:
    checkpoints.wait()
  return state
