# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes that do one merge together: they tell each other, or all end.

Every process holds a connection to the first one. Over it they exchange a few
numbers, in the same order everywhere; and a process that dies closes it, so
that the others know at once. JAX's own service would end them too, with a page
of addresses, and says nothing of why.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import queue
import socket
import struct
import threading
from typing import Any

from mergejax.core import errors

# Kinds of frames, and the length that follows them.
DATA, _FAILED, _ENDED = b'D', b'F', b'E'
_FRAME = struct.Struct('<cQ')
# Seconds after which a machine that does not answer is taken for lost.
_SILENCE = 30


class Lost(Exception):
  """Another process failed or is gone, so that this one cannot go on."""


class Group:
  """The processes of a merge, as one of them sees them.

  Attributes:
    index: of this process, from 0.
    count: of all.

  Example:
    >>> Group().gather(b'alone')
    [b'alone']
  """

  def __init__(
    self,
    index: int = 0,
    count: int = 1,
    connections: Mapping[int, socket.socket] | None = None,
  ):
    """Listens to the others; see `join`.

    Args:
      index: of this process.
      count: of all processes.
      connections: of the first process: to each of the others; of the others:
        to the first.
    """
    self.index, self.count = index, count
    self._connections = dict(connections or {})
    self._lost: Lost | errors.Stopped | None = None
    self._closing = threading.Event()
    self._waiting: dict[int, queue.SimpleQueue] = {
      peer: queue.SimpleQueue() for peer in self._connections
    }
    self._sending = threading.Lock()
    for peer, connection in self._connections.items():
      _notice_silence(connection)
      threading.Thread(
        target=self._listen, args=(peer, connection), daemon=True
      ).start()

  # What the others say -------------------------------------------------------

  def _listen(self, peer, connection):
    with connection:
      self._hear(peer, connection)
      self._closing.wait()

  def _hear(self, peer, connection):
    while True:
      try:
        kind, payload = receive(connection)
      except OSError:
        kind, payload = b'', b''
      if kind == DATA:
        self._waiting[peer].put(payload)
        continue
      if kind == _FAILED:
        self._lose(json.loads(payload), peer)
      elif kind != _ENDED:
        what = (
          f'Process {peer} of {self.count} is gone: it was killed, or its '
          'machine is lost'
        )
        self._lose({'stopped': False, 'message': what}, peer)
      self._waiting[peer].put(None)
      return

  def _lose(self, word, peer):
    """Notes why this process cannot go on; the first one tells the others."""
    if self._lost is None and not self._closing.is_set():
      kind = errors.Stopped if word['stopped'] else Lost
      self._lost = kind(word['message'])
      for waiting in self._waiting.values():
        waiting.put(None)
      if self.index == 0:
        self._tell(_FAILED, json.dumps(word).encode(), but=peer)

  def _tell(self, kind, payload=b'', but=None):
    with self._sending:
      for peer, connection in self._connections.items():
        if peer != but:
          # One that cannot be told is found out by its own silence.
          with contextlib.suppress(OSError):
            connection.sendall(frame(kind, payload))

  def check(self) -> None:
    """Raises if another process cannot go on.

    Raises:
      Lost: it failed, or was killed.
      errors.Stopped: it was asked to stop.
    """
    if self._lost is not None:
      raise self._lost

  def _take(self, peer):
    found = self._waiting[peer].get()
    self.check()
    if found is None:
      raise Lost(f'Process {peer} of {self.count} ended before the merge did')
    return found

  # What all do together ------------------------------------------------------

  def gather(self, payload: bytes = b'') -> list[bytes]:
    """What every process gives, in their order; waits for all of them.

    Args:
      payload: of this process. All call this equally often, in the same order.

    Raises:
      Lost: another process failed, or was killed.
      errors.Stopped: another process was asked to stop.
    """
    self.check()
    if self.count == 1:
      return [payload]
    if self.index:
      self._tell(DATA, payload)
      return _unpacked(self._take(0))
    gathered = [payload] + [self._take(k) for k in range(1, self.count)]
    self._tell(DATA, _packed(gathered))
    return gathered

  def gather_json(self, value: Any) -> list[Any]:
    """`gather` of what JSON can say."""
    return [
      json.loads(word) for word in self.gather(json.dumps(value).encode())
    ]

  def check_same(self, record: Mapping[str, Any]) -> None:
    """Raises if this process would merge anything else than the first.

    Args:
      record: `identity.record` of the merge.

    Raises:
      UserError: here, if what this process sees differs; `Lost` in the others.
    """
    if self.count == 1:
      return
    first = self.gather_json(record)[0]
    lines = errors.differences(first, record)
    if lines:
      raise errors.CheckpointError(
        f'Process {self.index} of {self.count} does not see what the first '
        f'process sees:\n{errors.listed(lines)}\n(there: process 0.) All need '
        'the same recipe, the same files under the same paths, and the same '
        'version of the code.'
      )
    self.gather()  # all are content, or somebody raised

  def __enter__(self) -> 'Group':
    return self

  def __exit__(self, kind, error, trace) -> None:
    self.close(error)

  def close(self, error: BaseException | None = None) -> None:
    """Ends; an error of this process ends the others too, who hear of it."""
    if self._closing.is_set():
      return
    if error is None:
      self._tell(_ENDED)
    elif self._lost is None:
      self._tell(_FAILED, json.dumps(self._word(error)).encode())
    for connection in self._connections.values():
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    self._closing.set()

  def _word(self, error):
    stopped = isinstance(error, (errors.Stopped, KeyboardInterrupt))
    who = f'Process {self.index} of {self.count} ({socket.gethostname()})'
    if stopped:
      return {'stopped': True, 'message': f'{who} was asked to stop'}
    text = getattr(error, 'message', None) or errors.first_line(error)
    if not isinstance(error, errors.UserError):
      text = f'{type(error).__name__}: {text}'
    return {'stopped': False, 'message': f'{who} failed: {text}'}


# Bytes -----------------------------------------------------------------------


def _notice_silence(connection):
  """Has the system close a connection to a machine that is gone."""
  if connection.family not in (socket.AF_INET, socket.AF_INET6):
    return  # both ends are of one machine
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, seconds in (
    ('TCP_KEEPIDLE', _SILENCE // 3),
    ('TCP_KEEPINTVL', _SILENCE // 6),
    ('TCP_KEEPCNT', 4),
    ('TCP_USER_TIMEOUT', _SILENCE * 1000),
  ):
    if hasattr(socket, name):
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def frame(kind: bytes, payload: bytes) -> bytes:
  """What is sent of one kind."""
  return _FRAME.pack(kind, len(payload)) + payload


def receive(
  connection: socket.socket, most: int = 1 << 40
) -> tuple[bytes, bytes]:
  """`(kind, payload)` of the next frame.

  Raises:
    OSError: the connection was closed, or this is no frame.
  """
  kind, length = _FRAME.unpack(_exactly(connection, _FRAME.size))
  if length > most:
    raise OSError('This is no frame.')
  return kind, _exactly(connection, length)


def _exactly(connection, count):
  data = bytearray()
  while len(data) < count:
    block = connection.recv(min(count - len(data), 1 << 20))
    if not block:
      raise OSError('The connection was closed.')
    data += block
  return bytes(data)


def _packed(parts: Sequence[bytes]) -> bytes:
  lengths = struct.pack(f'<{len(parts) + 1}Q', len(parts), *map(len, parts))
  return lengths + b''.join(parts)


def _unpacked(data):
  (count,) = struct.unpack_from('<Q', data)
  lengths = struct.unpack_from(f'<{count}Q', data, 8)
  parts, at = [], 8 + 8 * count
  for length in lengths:
    parts.append(data[at : at + length])
    at += length
  return parts


def by_turns(group: Group, jobs: Sequence[Callable[[], Any]]) -> None:
  """Runs generators in step: what each yields is gathered from all processes.

  A job yields bytes and is sent the list of what the same job yielded in every
  process; every job yields equally often in all of them.

  Args:
    group: the processes.
    jobs: functions that make the generators, the same ones in every process.
  """
  running = {k: job() for k, job in enumerate(jobs)}
  said = {}
  for k in list(running):
    said[k] = next(running[k], None)
  while any(word is not None for word in said.values()):
    order = [k for k, word in said.items() if word is not None]
    heard = [
      _unpacked(words)
      for words in group.gather(_packed([said[k] for k in order]))
    ]
    for place, k in enumerate(order):
      try:
        said[k] = running[k].send([words[place] for words in heard])
      except StopIteration:
        said[k] = None
