# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Files and directories that are written whole or not at all."""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import pathlib
import shutil
import uuid

from mergejax.core import errors


def check_new(path: os.PathLike | str) -> None:
  """Refuses to create what is already there; ask before the work, not after.

  Raises:
    UserError: `path` exists.
  """
  if pathlib.Path(path).exists():
    raise errors.CheckpointError(
      f'{path} already exists. Choose another name, or remove it first.'
    )


@contextlib.contextmanager
def atomic_path(
  path: os.PathLike | str, *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """Gives a temporary path beside `path` that becomes it on success.

  A reader sees the whole result or none of it. On failure, and whatever signal
  comes when, the temporary is removed and what stood at `path` before is
  untouched. Everything is on the disk before it has its name: a power cut
  leaves the old or the new, never an empty file.

  Args:
    path: a file or directory to create.
    overwrite: replace what stands at `path`; an error otherwise.

  Yields:
    The temporary path, whose parent exists.

  Raises:
    UserError: `path` exists, or the disk is full or not writable.
  """
  path = pathlib.Path(path)
  if not overwrite:
    check_new(path)
  # A folder of its own: whatever a library leaves beside its file goes with it.
  folder = path.with_name(f'.{path.name}.tmp-{uuid.uuid4().hex[:8]}')
  try:
    folder.mkdir(parents=True)
    temporary = folder / path.name
    yield temporary
    sync(temporary)
    _take_place(temporary, path)
    sync(path.parent, deep=False)
  except Exception as error:
    if is_write_failure(error):
      raise errors.CheckpointError(
        f'Could not write {path}: {write_failure_reason(error)}. What was '
        'there before is untouched; free some space, or write elsewhere, and '
        'run this again.'
      ) from error
    raise
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: os.PathLike | str, *, deep: bool = True) -> None:
  """Waits until a file, or a directory with all that is in it, is on the disk.

  Args:
    path: the file or directory.
    deep: also what the directory contains; without it, only its list of names.
  """
  path = pathlib.Path(path)
  inside = path.rglob('*') if deep and path.is_dir() else ()
  for one in [*inside, path]:
    if one.is_symlink():
      continue
    descriptor = os.open(one, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _take_place(temporary, path):
  """Puts the new at `path`; what stood there is at `temporary` or gone."""
  if not os.path.lexists(path):
    os.rename(temporary, path)
  elif temporary.is_dir() or (path.is_dir() and not path.is_symlink()):
    _exchange(temporary, path)
  else:
    os.replace(temporary, path)


def _exchange(temporary, path):
  """Swaps two paths in one step: a directory cannot be replaced.

  Where the system or the disk has no such step, in three; a signal between
  them puts the old one back.
  """
  if _renameat2(temporary, path):
    return
  old = path.with_name(f'.{path.name}.old-{uuid.uuid4().hex[:8]}')
  try:
    os.rename(path, old)
    os.rename(temporary, path)
    os.rename(old, temporary)
  except BaseException:
    if old.exists():
      os.rename(old, path if not path.exists() else temporary)
    raise


def _renameat2(first, second) -> bool:
  """True if Linux exchanged two paths."""
  library = ctypes.CDLL(None, use_errno=True)
  if not hasattr(library, 'renameat2'):
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  return not library.renameat2(
    here, os.fsencode(first), here, os.fsencode(second), exchange
  )


def is_write_failure(error: BaseException) -> bool:
  """True if an exception, whatever library wrapped it, is a failed write."""
  if isinstance(error, errors.UserError):
    return False
  text = str(error)
  return isinstance(error, OSError) or any(
    sign in text
    for sign in ('No space left', 'File too large', 'quota', 'Read-only file')
  )


def write_failure_reason(error: BaseException) -> str:
  """The operating system's word for a failed write."""
  for sign in ('No space left on device', 'File too large'):
    if sign in str(error):
      return sign
  return getattr(error, 'strerror', None) or errors.first_line(error)
