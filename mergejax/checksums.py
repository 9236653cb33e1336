# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""sha256 of files in the background; imports nothing heavy.

Summing a file takes as long as merging it. A command starts it before JAX is
imported, which leaves a core idle for a second.
"""

from collections.abc import Iterable
import hashlib
import os
import pathlib
import queue
import threading

_BLOCK = 1 << 20


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
    self._events: dict[tuple, threading.Event] = {}
    self._found: dict[tuple, str | OSError] = {}
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
    key = (os.fspath(file), status.st_size, status.st_mtime_ns)
    with self._lock:
      if key not in self._events:
        self._events[key] = threading.Event()
        self._waiting.put(key)
        if self._thread is None:
          self._thread = threading.Thread(target=self._work, daemon=True)
          self._thread.start()
    return key

  def _work(self):
    while True:
      key = self._waiting.get()
      try:
        total = hashlib.sha256()
        with open(key[0], 'rb') as stream:
          while block := stream.read(_BLOCK):
            total.update(block)
        self._found[key] = total.hexdigest()
      except OSError as error:
        self._found[key] = error
      self._events[key].set()


# One thread for the whole process.
SUMS = Sums()
