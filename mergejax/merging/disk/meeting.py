# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How the processes of a merge find each other: by hand, or by environment."""

import json
import signal
import socket
import threading
import time

from mergejax import partition
from mergejax.core import errors
from mergejax.merging.disk import processes

_HELLO = 'mergejax merge'


def join(
  coordinator_address: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
  *,
  timeout: float = 300.0,
) -> processes.Group:
  """Joins the processes of a merge.

  Args:
    coordinator_address: `host:port` of the first process. On a TPU pod, under
      Slurm and the like, leave all three out: the environment tells.
    process_count: how many processes there are.
    process_index: which one this is, from 0.
    timeout: seconds to wait for the others.

  Returns:
    The group.

  Raises:
    UserError: an argument is missing, or not all came.
  """
  if coordinator_address is None:
    if process_count is not None or process_index is not None:
      raise errors.ConfigError(
        'Give --coordinator_address as well, or leave --process_count and '
        '--process_index out where the environment tells.'
      )
    return _join_by_environment(timeout)
  if process_count is None or process_index is None:
    raise errors.ConfigError(
      'With --coordinator_address every process needs --process_count and '
      '--process_index.'
    )
  host, _, port = coordinator_address.rpartition(':')
  if not host or not port.isdigit():
    raise errors.ConfigError(
      f'--coordinator_address should be HOST:PORT, not {coordinator_address!r}.'
    )
  if not 0 <= process_index < process_count:
    raise errors.ConfigError(
      f'--process_index counts from 0 to {process_count - 1}, not '
      f'{process_index}.'
    )
  if process_count == 1:
    return processes.Group()
  if process_index:
    return _reach([host], int(port), process_index, process_count, timeout)
  return _await(_listener(int(port)), process_count, timeout)


def _join_by_environment(timeout):
  """Asks JAX who the others are, and leaves it before it could end us."""
  import jax  # pylint: disable=import-outside-toplevel
  from jax.experimental import multihost_utils  # pylint: disable=import-outside-toplevel
  import numpy as np  # pylint: disable=import-outside-toplevel

  partition.join_processes()
  index, count = jax.process_index(), jax.process_count()
  listener = _listener(0) if index == 0 else None
  word = np.zeros(256, np.uint8)
  if listener is not None:
    hosts = ','.join(_own_names())
    name = f'{hosts}:{listener.getsockname()[1]}'.encode()
    word[: len(name)] = np.frombuffer(name, np.uint8)
  told = np.asarray(multihost_utils.broadcast_one_to_all(word)).astype(np.uint8)
  jax.distributed.shutdown()
  if threading.current_thread() is threading.main_thread():
    # JAX listens to SIGTERM in its own way, and goes on doing so.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
  if count == 1:
    return processes.Group()
  if listener is not None:
    return _await(listener, count, timeout)
  hosts, _, port = told.tobytes().rstrip(b'\0').decode().rpartition(':')
  return _reach(hosts.split(','), int(port), index, count, timeout)


def _own_names() -> list[str]:
  """What other machines may know this one by: its name, its address."""
  names = [socket.gethostname()]
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(('10.255.255.255', 9))  # sends nothing
      names.append(probe.getsockname()[0])
    except OSError:
      pass  # a machine without a network
  return names


def _listener(port):
  try:
    # Both kinds of addresses where the machine has both.
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ('', port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(('', port))
  except OSError as error:
    raise errors.ConfigError(
      f'The first process cannot listen at port {port} ({error.strerror}): '
      'give --coordinator_address another one.'
    ) from error


def _await(listener, count, timeout):
  """The group of the first process, once all others came."""
  until = time.monotonic() + timeout
  connections: dict[int, socket.socket] = {}
  with listener:
    while len(connections) < count - 1:
      listener.settimeout(max(0.01, until - time.monotonic()))
      try:
        connection, _ = listener.accept()
      except TimeoutError as error:
        missing = sorted(set(range(1, count)) - set(connections))
        raise errors.ConfigError(
          f'Of {count} processes these did not come within {timeout:.0f} s: '
          f'{", ".join(map(str, missing))}. Start all with the same command '
          'but for --process_index.'
        ) from error
      index = _greeted(connection, count)
      if index is None or index in connections:
        connection.close()  # a stranger
      else:
        connections[index] = connection
  return processes.Group(0, count, connections)


def _greeted(connection, count):
  """The index of a process that says what it should, None of any other."""
  connection.settimeout(10.0)
  try:
    _, payload = processes.receive(connection, most=1000)
    said, index, of = json.loads(payload)
    connection.settimeout(None)
  except (OSError, ValueError, TypeError):
    return None
  sound = said == _HELLO and of == count and index in range(1, count)
  return index if sound else None


def _reach(hosts, port, index, count, timeout):
  """The group of another process, once the first answers under one name."""
  until = time.monotonic() + timeout
  connection, error = None, None
  while connection is None:
    for host in hosts:
      try:
        connection = socket.create_connection((host, port), 10.0)
        break
      except OSError as failure:
        error = failure
    if connection is None:
      if time.monotonic() > until:
        raise errors.ConfigError(
          f'Process {index} of {count} does not reach the first one at '
          f'{" or ".join(hosts)}, port {port} ({error}).'
        ) from error
      time.sleep(0.1)
  connection.settimeout(None)
  hello = json.dumps([_HELLO, index, count]).encode()
  connection.sendall(processes.frame(processes.DATA, hello))
  return processes.Group(index, count, {0: connection})
