# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""sha256 of files, in the background, and once; imports nothing heavy.

Summing a file takes as long as merging it. So a command starts it before JAX
is imported, which leaves a core idle for a second, and sums are remembered:
a sweep of merges reads the same checkpoints again and again. A file counts as
unchanged while device, inode, size, modification and status-change time are
the same, which is what git's index goes by.
"""

from collections.abc import Iterable
import hashlib
import json
import os
import pathlib
import queue
import tempfile
import threading

_BLOCK = 1 << 20
_MOST = 10_000  # files that are remembered


def memory_file() -> pathlib.Path:
  """Where sums are remembered: `~/.cache/mergejax/sha256.json`."""
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache) / 'mergejax' / 'sha256.json'


class Sums:
  """Sums files one after the other in a thread of its own.

  The thread ends with the process, at the latest: nothing waits for it that
  does not ask for a sum.

  Example:
    >>> sums = Sums()
    >>> _ = pathlib.Path('/tmp/doc.txt').write_text('text')
    >>> sums.of(pathlib.Path('/tmp/doc.txt'))[:8]
    '982d9e3e'
  """

  def __init__(self):
    self._waiting: queue.SimpleQueue = queue.SimpleQueue()
    self._events: dict[str, threading.Event] = {}
    self._found: dict[str, str | OSError] = {}
    self._lock = threading.Lock()
    self._thread: threading.Thread | None = None

  def start(self, files: Iterable[pathlib.Path]) -> None:
    """Begins with files that are not summed yet."""
    for file in files:
      self._enqueue(file)

  def of(self, file: pathlib.Path) -> str:
    """The sum of a file as it is now; waits for it."""
    key = self._enqueue(file)
    self._events[key].wait()
    found = self._found[key]
    if isinstance(found, OSError):
      raise found
    return found

  def _enqueue(self, file):
    status = file.stat()
    key = ':'.join(
      str(part)
      for part in (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
        status.st_ctime_ns, file.absolute(),
      )
    )  # fmt: skip
    with self._lock:
      if key not in self._events:
        self._events[key] = threading.Event()
        self._waiting.put((key, file))
        if self._thread is None:
          self._thread = threading.Thread(target=self._work, daemon=True)
          self._thread.start()
    return key

  def _work(self):
    remembered = _remembered()
    while True:
      key, file = self._waiting.get()
      if key in remembered:
        self._found[key] = remembered[key]
      else:
        try:
          total = hashlib.sha256()
          with open(file, 'rb') as stream:
            while block := stream.read(_BLOCK):
              total.update(block)
          self._found[key] = remembered[key] = total.hexdigest()
          _remember(key, remembered[key])
        except OSError as error:
          self._found[key] = error
      self._events[key].set()


def _remembered() -> dict[str, str]:
  """What earlier processes summed; nothing if that cannot be read."""
  try:
    data = json.loads(memory_file().read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  sound = isinstance(data, dict) and all(
    isinstance(value, str) and len(value) == 64 for value in data.values()
  )
  return data if sound else {}


def _remember(key: str, digest: str) -> None:
  """Adds a sum; a home that cannot be written to is no obstacle."""
  file = memory_file()
  try:
    data = _remembered()
    data[key] = digest
    data = dict(list(data.items())[-_MOST:])
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
      'w', dir=file.parent, delete=False, encoding='utf-8'
    ) as stream:
      json.dump(data, stream)
    os.replace(stream.name, file)
  except OSError:
    pass


# One thread for the whole process.
SUMS = Sums()
