# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The hidden folder beside a result in which a merge works, and its journal."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import contextlib
import fcntl
import os
import pathlib
import shutil
import threading
from typing import Any

from mergejax.checkpoints import safetensors
from mergejax.core import errors
from mergejax.core import resume as resume_lib
from mergejax.core import typing


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
    self._journal: resume_lib.Journal | None = None

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
    *,
    processes: int = 1,
    others: int = 0,
  ) -> set[typing.Path]:
    """Finds what an interrupted call left, or lays the files out anew.

    Args:
      identity: `identity.record` of the merge.
      shards: the files of the result.
      sizes: bytes of each parameter of the result that is merged here.
      resume: continue what is there, if it is the same merge.
      anonymous: no two processes can know that theirs is the same merge.
      processes: how many work here; this is the first of them, and the others
        call `follow` after it.
      others: bytes of the result that they write.

    Returns:
      The parameters that are merged already.

    Raises:
      UserError: the disk has no room for the others; or an anonymous merge is
        there that cannot be known to be this one.
    """
    self._journal = self._open_journal(identity, 0, processes)
    done = set()
    found = self._journal.stated() if resume else None
    if anonymous and found not in (None, self._journal.record):
      raise errors.CheckpointError(
        f'{self.path} holds a merge that was interrupted, and whether it is '
        'this one is not known: its method is a Merge without a name. Give '
        '`plan` an `identity=` that changes whenever its numbers do, or '
        'start afresh with `resume=False`.'
      )
    lost = [shard for shard in shards if not self._has_its_size(shard)]
    if found == self._journal.record and (processes == 1 or not lost):
      done = set(self._journal.rows())
      others = 0
    elif processes > 1 and not lost and _same_work(found, self._journal.record):
      # Only this machine was started anew: the others' work is there.
      self._journal.forget()
      others = 0
    else:
      self._clear()
      lost = list(shards)
    self.result.mkdir(exist_ok=True)
    done &= set(sizes)
    self.keep = bool(done)
    left = sum(n for path, n in sizes.items() if path not in done)
    self._check_space(left + others)
    self.keep = False
    still = done - {path for shard in lost for path in shard.offsets}
    if still != done:
      # Before the file is laid out anew, or it would look complete.
      self._journal.forget()
    for shard in lost:
      with open(self.result / shard.file, 'wb') as stream:
        stream.write(shard.header)
        stream.truncate(shard.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    self._journal.begin()
    if still != done:
      for path in sorted(still):
        self.note(path)
    return still

  def _clear(self):
    """Removes what another merge, or another call of this one, left."""
    for child in self.path.iterdir():
      if child.name != 'lock':
        shutil.rmtree(child) if child.is_dir() else child.unlink()

  def follow(
    self,
    identity: Mapping[str, Any],
    sizes: Collection[typing.Path],
    index: int,
    processes: int,
  ) -> set[typing.Path]:
    """`prepare` of every process but the first, after that of the first.

    Args:
      identity: `identity.record` of the merge.
      sizes: the parameters that are merged here.
      index: of this process.
      processes: how many there are.

    Returns:
      The parameters of which this process has merged its part already.
    """
    self._journal = self._open_journal(identity, index, processes)
    done = set()
    if self._journal.stated() == self._journal.record:
      done = set(self._journal.rows()) & set(sizes)
    else:
      self._journal.forget()
    self._journal.begin()
    return done

  def _open_journal(self, identity, index, processes):
    """Of one process; it states whose part it tells of."""
    # A crash of the machine may have lost what a line of the journal says.
    work = {**identity['work'], 'boot': _boot()}
    if processes > 1:
      work['processes'] = [index, processes]
    name = f'journal-{index}' if index else 'journal'
    return resume_lib.Journal(self.path / name, 'merge', work)

  def _has_its_size(self, shard):
    file = self.result / shard.file
    return file.exists() and file.stat().st_size == shard.nbytes

  def _check_space(self, needed):
    free = shutil.disk_usage(self.path).free
    if needed > free:
      raise errors.CheckpointError(
        f'{self._out} needs {needed / 1e6:,.1f} MB more and the disk has '
        f'{free / 1e6:,.1f} MB free. The sources are untouched; free some '
        'space, or write elsewhere, and run this again.'
      )

  def note(self, path: typing.Path) -> None:
    """Notes one more merged parameter; thread-safe, once it is prepared."""
    # The arrays are on their way to the disk too, and are waited for at the end.
    self._journal.append(path, sync=False)

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


def _same_work(found, wanted) -> bool:
  """True if two statements differ in nothing but when a machine was started."""
  if not found:
    return False
  plain = [
    {**one, 'work': {**one['work'], 'boot': ''}} for one in (found, wanted)
  ]
  return plain[0] == plain[1]


def _boot() -> str:
  """The machine's name for the time since it was started.

  What was written before a crash of the machine may not have reached the disk,
  whatever the journal says.
  """
  file = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return file.read_text().strip() if file.is_file() else ''
