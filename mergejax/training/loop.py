# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, callbacks, checkpoints, exact resume, clean stop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mergejax import partition
from mergejax.core import errors
from mergejax.core import stop as stop_lib
from mergejax.training import callbacks as callbacks_lib
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import state as state_lib
from mergejax.training import streams

StepFn = Callable[
  [state_lib.TrainState, Any], tuple[state_lib.TrainState, dict[str, jax.Array]]
]


class Stream(Protocol):
  """Training batches with a position; see also `streams.restore`."""

  def __next__(self) -> Any: ...

  def state(self) -> bytes: ...

  def restore(self, state: bytes) -> None: ...


def fit(
  step_fn: StepFn,
  state: state_lib.TrainState,
  stream: Stream,
  *,
  steps: int,
  checkpoints: checkpoints_lib.Checkpoints | None = None,
  save_every: int = 1000,
  log_every: int = 10,
  callbacks: Sequence[callbacks_lib.Callback] = (),
  checks: Sequence[Callable[[int, Mapping[str, np.ndarray]], None]] = (),
  place: Callable[[Any], Any] = lambda batch: batch,
) -> state_lib.TrainState:
  """Trains until `steps`, from the newest checkpoint if there is one.

  A run that is killed and started again ends with the same bits as one that
  was not: state and data position are saved together, and every random number
  depends on the key and the step alone.

  Args:
    step_fn: a compiled step; its state argument may be donated.
    state: where to begin when there is no checkpoint; where there is one,
      shapes with shardings are enough.
    stream: the data, see `Stream`.
    steps: the step number to reach.
    checkpoints: where to save; None saves nothing.
    save_every: steps between checkpoints; the last step is always saved.
    log_every: steps between logged metrics. In between nothing waits for the
      device.
    callbacks: see `callbacks.Callback`; they are started and closed elsewhere.
    checks: called with logged metrics, and with those of a step that is to be
      saved, before it is; they raise to end the run.
    place: puts a batch of the stream on the devices.

  Returns:
    The state after `steps` steps.

  Raises:
    errors.Stopped: SIGTERM came; the state is saved.
    UserError: a checkpoint could not be written or does not fit, the run is
      beyond the last step already, or a number of steps is none.
  """
  check_numbers(steps=steps, save_every=save_every, log_every=log_every)
  if checkpoints is not None and checkpoints.latest() is not None:
    state, positions = checkpoints.restore(state)
    streams.restore(stream, positions)
  step = state_lib.step_number(state)
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
      tell(callbacks, checks, step, state, metrics, log)
      stopping = stop.agreed(may_wait=log)
      save = stopping or step == steps or step % save_every == 0
      if checkpoints is not None and save:
        if checks and not log:
          found = partition.to_host(metrics)
          for check in checks:
            check(step, found)
        checkpoints.save(state, stream.state())
        for callback in callbacks:
          callback.on_save(step, state)
      if stopping:
        if checkpoints is not None:
          checkpoints.wait()
        raise errors.Stopped(f'Stopped at step {step} of {steps}.')
  if checkpoints is not None:
    checkpoints.wait()
  return state


def check_numbers(*, steps: int, save_every: int, log_every: int) -> None:
  """Raises for a number of steps that is none."""
  errors.check_whole('steps', steps, least=0)
  errors.check_whole('save_every', save_every)
  errors.check_whole('log_every', log_every)


def tell(
  callbacks: Sequence[callbacks_lib.Callback],
  checks: Sequence[Callable[..., None]],
  step: int,
  state: state_lib.TrainState,
  metrics: Mapping[str, jax.Array],
  log: bool,
) -> None:
  """Tells callbacks of a step, and of what there is to log of it."""
  logged = {}
  if log:
    # Fetched by every process, whether it has callbacks or not: the metrics of
    # experts are spread over all of them.
    logged.update(partition.to_host(metrics))
    for check in checks:
      check(step, logged)
  for callback in callbacks:
    logged.update(callback.on_step(step, state) or {})
  for callback in callbacks if logged else ():
    callback.on_log(step, logged)
