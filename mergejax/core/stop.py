# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The request to stop (SIGTERM), heard between two steps of the work.

Merges, statistics, searches and training runs listen with this; what they had
done by then is in their journals and checkpoints.
"""

from collections.abc import Callable
import signal
import threading
from typing import Any

from mergejax.core import errors


class StopRequest:
  """Notes SIGTERM while it is entered, so that work ends between two steps.

  Only the main thread of a process hears signals; elsewhere nothing is noted.
  A request that came when the last step was done, so that nobody acted on it,
  goes on to whoever listened before.

  Attributes:
    received: True once the request came.

  Example:
    >>> with StopRequest() as stop:
    ...   for step in range(3):
    ...     stop.check(f'Stopped before step {step}.')
  """

  def __init__(self, at_once: str | None = None):
    """Prepares to listen.

    Args:
      at_once: raises `errors.Stopped` with this text when the request comes,
        wherever the main thread is: for what is not done in steps.
    """
    self.received = False
    self._at_once = at_once
    self._previous: Callable[..., Any] | int | None = None
    self._listens = False

  def __enter__(self) -> 'StopRequest':
    self._listens = threading.current_thread() is threading.main_thread()
    if self._listens:
      self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def _note(self, number, frame):
    del number, frame
    self.received = True
    if self._at_once is not None:
      raise errors.Stopped(self._at_once)

  def __exit__(self, kind, *_) -> None:
    if self._listens:
      # None stands for a handler that was not set from Python.
      before = signal.SIG_DFL if self._previous is None else self._previous
      signal.signal(signal.SIGTERM, before)
      if self.received and kind is None and self._at_once is None:
        signal.raise_signal(signal.SIGTERM)

  def check(self, message: str) -> None:
    """Ends the work here if the request came.

    Raises:
      errors.Stopped: with the message, which says how far the work is.
    """
    if self.received:
      raise errors.Stopped(message)

  def agreed(self, *, may_wait: bool = True) -> bool:
    """True if the work should end here, the same in every process.

    Processes may get the signal between different steps; they ask each other
    only where they wait for each other anyway.

    Args:
      may_wait: all processes are at this point; without it a run of several
        processes does not end here.
    """
    import jax  # pylint: disable=import-outside-toplevel

    if jax.process_count() == 1:
      return self.received
    if not may_wait:
      return False
    from jax.experimental import multihost_utils  # pylint: disable=import-outside-toplevel
    import numpy as np  # pylint: disable=import-outside-toplevel

    received = multihost_utils.process_allgather(np.array(self.received))
    return bool(received.any())
