# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The journal of unfinished work: killed, it continues from what is done.

What a journal holds is continued only by the same work of the same code, see
`identity`. Work that is asked to stop rather than killed is in `stop`.
"""

from collections.abc import Mapping
import json
import os
import pathlib
import threading
from typing import Any
import zipfile

import numpy as np

from mergejax.core import errors
from mergejax.core import files
from mergejax.core import identity

# The entry of a saved state that says what it is of; arrays have a prefix.
_ABOUT = 'about'
_ARRAY = 'array:'


class Journal:
  """What unfinished work has done, in one file, under a statement of the work.

  It has two forms, for two kinds of work. Work that consists of many answers
  notes each as a line: `rows` and `append`. Work that carries a state from step
  to step replaces the whole file: `load` and `save`. A file is of one form.

  Attributes:
    path: of the file; None keeps nothing, and nothing is ever found.
    record: the statement of the work, `identity.record(work)`.

  Example:
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   journal = Journal(f'{folder}/log', 'search', {'seed': 0})
    ...   journal.append({'point': 1})
    ...   Journal(f'{folder}/log', 'search', {'seed': 0}).rows()
    [{'point': 1}]
  """

  def __init__(
    self,
    path: os.PathLike | str | None,
    kind: str,
    work: Mapping[str, Any],
  ):
    """Names a journal; touches no file.

    Args:
      path: of the file.
      kind: the name under which the file states the work: 'search'.
      work: what makes it another work if it differs, as plain data.
    """
    self.path = None if path is None else pathlib.Path(path)
    self.record = identity.record(work)
    self._kind = kind
    self._lock = threading.Lock()

  # Lines ---------------------------------------------------------------------

  def rows(self) -> list[Any]:
    """The lines that `append` wrote, in order; a torn last line is cut off.

    Raises:
      ConfigError: the file is of other work, or of another version of the code.
      DataError: the file is no journal.
    """
    lines = self._lines()
    if self.path is None or not lines:
      return []
    identity.check_same(self._stated(lines[0]), self.record, self.path)
    return lines[1:]

  def stated(self) -> dict[str, Any] | None:
    """The work that the lines are of: `record` if this one; None without any."""
    try:
      lines = self._lines()
    except errors.DataError:
      return {}
    return (self._stated(lines[0]) or {}) if lines else None

  def append(self, row: Any, *, sync: bool = True) -> None:
    """Notes one more line; thread-safe. The first one states the work.

    Args:
      row: what `json` can write.
      sync: waits for the disk, so that the line outlives a crash of the machine
        and not only one of the process.
    """
    if self.path is not None:
      self._write(self.path, [row], sync)

  def begin(self) -> None:
    """States the work, if the file does not yet: `append` does so as well."""
    if self.path is not None:
      self._write(self.path, [], True)

  def _write(self, path, rows, sync):
    with self._lock:
      path.parent.mkdir(parents=True, exist_ok=True)
      flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
      file = os.open(path, flags, 0o644)
      try:
        if not os.fstat(file).st_size:
          rows = [{self._kind: self.record}, *rows]
        data = memoryview(''.join(json.dumps(r) + '\n' for r in rows).encode())
        while data:
          data = data[os.write(file, data) :]
        if sync:
          os.fsync(file)
      finally:
        os.close(file)

  def _lines(self):
    if self.path is None or not self.path.exists():
      return []
    data = self.path.read_bytes()
    whole = data[: data.rfind(b'\n') + 1]
    if whole != data:  # killed while writing a line
      os.truncate(self.path, len(whole))
    try:
      return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
      raise self._unreadable(error) from error

  # State ---------------------------------------------------------------------

  def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """What `save` wrote last: `(arrays, about)`; None if there is no file.

    Raises:
      ConfigError: the file is of other work, or of another version of the code.
      DataError: the file is no journal.
    """
    if self.path is None or not self.path.exists():
      return None
    try:
      with open(self.path, 'rb') as stream:
        entries = dict(np.load(stream, allow_pickle=False))
      about = json.loads(str(entries.pop(_ABOUT)))
    except (
      ValueError, TypeError, OSError, EOFError, KeyError, AttributeError,
      zipfile.BadZipFile,
    ) as error:  # fmt: skip
      raise self._unreadable(error) from error
    identity.check_same(self._stated(about), self.record, self.path)
    del about[self._kind]
    arrays = {name.removeprefix(_ARRAY): x for name, x in entries.items()}
    return arrays, about

  def save(
    self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
  ) -> None:
    """Replaces what was saved before: a reader finds the old or the new.

    Args:
      arrays: by name, of dtypes that NumPy itself has.
      about: what else belongs to the state, as `json` can write it.
    """
    if self.path is None:
      return
    text = json.dumps({**about, self._kind: self.record})
    entries: dict[str, Any] = {_ABOUT: np.array(text)}
    entries |= {_ARRAY + name: array for name, array in arrays.items()}
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(self.path, overwrite=True) as temporary:
      with open(temporary, 'wb') as stream:
        np.savez(stream, **entries)

  # Both ----------------------------------------------------------------------

  def forget(self) -> None:
    """Removes the file: the work is complete, or begins afresh."""
    if self.path is not None:
      self.path.unlink(missing_ok=True)

  def _stated(self, found):
    return found.get(self._kind) if isinstance(found, Mapping) else None

  def _unreadable(self, error):
    return errors.DataError(
      f'{self.path} cannot be read ({error}); remove it to start afresh.'
    )
