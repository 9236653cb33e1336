# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The hidden folder beside a result in which a merge works, and its journal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import threading
from typing import Any

from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.core import errors
from mergejax.core import resume as resume_lib
from mergejax.core import typing
from mergejax.merging.disk import side_cars


class WorkFolder:
  """`.NAME.partial`: files that have their size from the start, and a journal.

  Attributes:
    path: the folder.
    result: in it, the files of the result.
    keep: what is done stays when the merge fails, for the next call.
  """

  def __init__(self, out: pathlib.Path):
    self._out = out
    self.path = out.with_name(f'.{out.name}.partial')
    self.result = self.path / 'result'
    self.keep = False
    self._journal = self.path / 'journal'
    self._journal_lock = threading.Lock()

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """One merge at a time works towards an output.

    The folder goes when the merge fails, unless `keep` is set, before another
    process can take the lock.

    Raises:
      UserError: another merge works there, or the folder cannot be made.
    """
    with self._lock():
      try:
        yield
      except errors.UserError:
        if not self.keep:
          self.remove()
        raise

  @contextlib.contextmanager
  def _lock(self):
    while True:
      try:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / 'lock', 'wb')
      except FileNotFoundError:
        continue  # another merge has just removed the folder
      except OSError as error:
        raise errors.CheckpointError(
          f'Cannot create {self.path}: {error.strerror}.'
        ) from error
      with lock:
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
          raise errors.CheckpointError(
            f'Another merge is writing {self._out} at this moment.'
          ) from error
        if self._is_current(lock):
          yield
          return

  def _is_current(self, lock):
    """False if the file was removed between opening and locking it."""
    try:
      return os.path.samestat(
        os.fstat(lock.fileno()), os.stat(self.path / 'lock')
      )
    except FileNotFoundError:
      return False

  def prepare(
    self,
    identity: Mapping[str, Any],
    shards: Sequence[safetensors.Shard],
    sizes: Mapping[typing.Path, int],
    resume: bool,
    anonymous: bool = False,
  ) -> set[typing.Path]:
    """Finds what an interrupted call left, or lays the files out anew.

    Args:
      identity: `resume.record` of the merge.
      shards: the files of the result.
      sizes: bytes of each parameter of the result.
      resume: continue what is there, if it is the same merge.
      anonymous: no two processes can know that theirs is the same merge.

    Returns:
      The parameters that are merged already.

    Raises:
      UserError: the disk has no room for the others; or an anonymous merge is
        there that cannot be known to be this one.
    """
    state = self.path / 'state.json'
    wanted = {'identity': resume_lib.digest(identity), 'boot': _boot()}
    found = checkpoint.read_json(state) if state.is_file() else None
    done = set()
    if resume and anonymous and found not in (None, wanted):
      raise errors.CheckpointError(
        f'{self.path} holds a merge that was interrupted, and whether it is '
        'this one is not known: its method is a Merge without a name. Give '
        '`plan` an `identity=` that changes whenever its numbers do, or '
        'start afresh with `resume=False`.'
      )
    if resume and found == wanted:
      if self._journal.is_file():
        # A line that was cut short has no newline and does not count.
        done = set(self._journal.read_text(encoding='utf-8').split('\n')[:-1])
    else:
      for child in self.path.iterdir():
        if child.name != 'lock':
          shutil.rmtree(child) if child.is_dir() else child.unlink()
    self.result.mkdir(exist_ok=True)
    done &= set(sizes)
    self.keep = bool(done)
    self._check_space(sum(n for path, n in sizes.items() if path not in done))
    self.keep = False
    for shard in shards:
      file = self.result / shard.file
      if not file.exists() or file.stat().st_size != shard.nbytes:
        with open(file, 'wb') as stream:
          stream.write(shard.header)
          stream.truncate(shard.nbytes)
        done -= set(shard.offsets)
    side_cars.write_text(state, json.dumps(wanted))
    return done

  def _check_space(self, needed):
    free = shutil.disk_usage(self.path).free
    if needed > free:
      raise errors.CheckpointError(
        f'{self._out} needs {needed / 1e6:,.1f} MB more and the disk has '
        f'{free / 1e6:,.1f} MB free. The sources are untouched; free some '
        'space, or write elsewhere, and run this again.'
      )

  @contextlib.contextmanager
  def journal(self) -> Iterator[Callable[[typing.Path], None]]:
    """Gives a function that notes one more merged parameter; thread-safe."""
    file = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(path):
      with self._journal_lock:
        os.write(file, f'{path}\n'.encode())

    try:
      yield note
    finally:
      os.close(file)

  def remove(self) -> None:
    """Removes the folder with everything in it."""
    shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def writing_behind(files: Sequence[int]) -> Iterator[None]:
  """Has files written to the disk while they are still being made.

  Waiting for the disk at the end would take as long again as many a merge.

  Args:
    files: their descriptors.

  Raises:
    OSError: the disk failed; the system may tell of it but once.
  """
  stop, failed = threading.Event(), []

  def run():
    while not failed and not stop.wait(0.1):
      try:
        for file in files:
          os.fdatasync(file)
      except OSError as error:
        failed.append(error)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
  if failed:
    raise failed[0]


def _boot() -> str:
  """The machine's name for the time since it was started.

  What was written before a crash of the machine may not have reached the disk,
  whatever the journal says.
  """
  file = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return file.read_text().strip() if file.is_file() else ''
