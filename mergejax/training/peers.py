# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The processes of a run watch each other: when one dies, the others end too.

A process that waits for the share of a dead one waits for ever, or until the
runtime aborts it with a page of addresses. So each counts in a file of the
run's folder, which all of them share, and reads what the others count.
"""

from collections.abc import Callable, Generator
import contextlib
import os
import pathlib
import re
import shutil
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from mergejax.core import errors
from mergejax.core import files
from mergejax.training import callbacks

_FAILED = 'failed'
# What the runtime says where another process does not answer.
_UNANSWERED = re.compile(r'peer|Gloo|UNAVAILABLE|heartbeat|coordination', re.I)


def _leave(message: str, after: float) -> None:
  """Ends this process in so many seconds, whatever its main thread waits for."""
  print(f'mergejax: {message}', file=sys.stderr, flush=True)
  time.sleep(after)
  os._exit(1)


class Watch:
  """Counts in a file, and reads those of the other processes.

  Attributes:
    folder: of the files.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   watch = Watch(pathlib.Path(folder) / 'alive', index=0, count=1)
    ...   watch.close()
  """

  def __init__(
    self,
    folder: pathlib.Path,
    index: int,
    count: int,
    *,
    every: float = 5.0,
    patience: float = 40.0,
    leave: Callable[[str, float], None] = _leave,
  ):
    """Begins to count, in a thread of its own.

    Args:
      folder: of this run of all processes, and of no other.
      index: of this process.
      count: of processes.
      every: seconds between two counts.
      patience: seconds without a count after which a process is taken for dead.
      leave: ends this process with a message, after so many seconds.
    """
    self.folder, self._index, self._count = folder, index, count
    self._every, self._patience, self._leave = every, patience, leave
    folder.mkdir(parents=True, exist_ok=True)
    self._closing = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _file(self, index):
    return self.folder / f'process_{index}'

  def _write(self, text):
    with files.atomic_path(self._file(self._index), overwrite=True) as path:
      path.write_text(text)

  def _run(self):
    beat, before = 0, time.monotonic()
    last: dict[int, tuple[str, float]] = {}
    while not self._closing.is_set():
      lost, judges = None, False
      try:
        self._write(str(beat))
        beat += 1
        lost = self._lost(last)
        # Whoever was held up, by the disk or by what the main thread compiles,
        # cannot judge the others: the same may hold them up.
        judges = time.monotonic() - before < self._every + self._patience / 2
      except (OSError, errors.UserError):
        pass  # a full disk is no dead process
      before = time.monotonic()
      if not judges:
        last.clear()
      elif lost is not None and not self._closing.is_set():
        self._leave(
          f'{lost} This process ends too, as it would wait for the other '
          'without end. Start all processes again with the same command: the '
          'run goes on from its last checkpoint.',
          # The runtime aborts all others when the first process is gone.
          0.0 if self._index else 2 * self._every,
        )
        return
      self._closing.wait(self._every)

  def _lost(self, last):
    """What happened to a process that counts no more; None if all do."""
    now = time.monotonic()
    for index in range(self._count):
      try:
        text = self._file(index).read_text()
      except FileNotFoundError:  # it has not begun, or it ended
        last.pop(index, None)
        continue
      if text.startswith(_FAILED):
        return f'Process {index} of {self._count} {text}.'
      before, since = last.setdefault(index, (text, now))
      if text != before:
        last[index] = text, now
      elif now - since > self._patience:
        return (
          f'Process {index} of {self._count} has given no sign for '
          f'{now - since:.0f} s: it was killed, or its machine is gone.'
        )
    return None

  def close(self, failure: BaseException | None = None) -> None:
    """This process ends: as it should, or by an error that the others hear of.

    Args:
      failure: the error. One of the runtime, of another process that does not
        answer, is not this one's: it is waited for until that one is known.
    """
    if failure is not None and _UNANSWERED.search(str(failure)):
      self._thread.join(self._patience + 4 * self._every)
    self._closing.set()
    self._thread.join()
    try:
      if failure is None or isinstance(failure, errors.Stopped):
        self._file(self._index).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others still count there
          self.folder.rmdir()
      else:
        kind = type(failure).__name__
        self._write(f'{_FAILED} ({kind}: {errors.first_line(failure)})')
    except (OSError, errors.UserError):
      pass  # the others will see that it counts no more


class watch_peers(callbacks.Callback):  # pylint: disable=invalid-name
  """Ends a process of several when another one of them is dead.

  Some seconds after `patience`, with one message and exit code 1. A run of one
  process, or without a folder, watches nothing.
  Nor does it see what happens outside of the steps of `Trainer.fit`.
  """

  def __init__(self, *, every: float = 5.0, patience: float = 40.0):
    """See `Watch`; `every` and `patience` are seconds."""
    self._settings = {'every': every, 'patience': patience}
    self._watch: Watch | None = None

  def on_start(self, run):
    """Begins to watch; a folder that processes do not share is refused."""
    if run.directory is not None:
      self._watch = _begin(run.directory, self._settings)

  def close(self):
    _end(self._watch)
    self._watch = None


@contextlib.contextmanager
def watching(
  folder: pathlib.Path, **settings: float
) -> Generator[None, None, None]:
  """Work of all processes on one folder, which they watch each other in.

  Args:
    folder: shared by all processes.
    **settings: `every` and `patience` of `Watch`.

  Raises:
    ConfigError: the processes do not share the folder.
  """
  watch = _begin(folder, settings)
  try:
    yield
  finally:
    _end(watch)


def _end(watch):
  """Closes a `Watch` of `_begin`, and leaves no empty folder."""
  if watch is not None:
    watch.close(sys.exc_info()[1])
    with contextlib.suppress(OSError):  # others still count there
      watch.folder.parent.rmdir()


def from_first(value: int) -> int:
  """A whole number as the first process has it."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _begin(directory, settings):
  """A `Watch` in a shared folder; None for one process."""
  if jax.process_count() == 1:
    return None
  # What an earlier run left behind is not of this one.
  token = from_first(int(time.time()))
  alive = directory / 'alive'
  folder = alive / str(token)
  if jax.process_index() == 0:
    shutil.rmtree(alive, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
  multihost_utils.sync_global_devices('alive')
  _check_shared(folder)
  return Watch(folder, jax.process_index(), jax.process_count(), **settings)


def _check_shared(folder):
  """Raises, in all processes, if one does not see what the first has made."""
  seen = multihost_utils.process_allgather(np.array(folder.is_dir()))
  blind = [str(index) for index in np.flatnonzero(~seen)]
  if blind:
    raise errors.ConfigError(
      f'The folder of the run, {folder.parents[1]}, is not the same in all '
      f'processes: what process 0 writes there, process {errors.some(blind)} '
      'does not see. Each writes its own part of a checkpoint, so name a '
      'folder on a file system that all share.'
    )
