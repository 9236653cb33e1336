# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes of one merge as threads of a test, over real connections."""

import concurrent.futures
import contextlib
import socket
from unittest import mock

import mergejax as mj
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans
from mergejax.merging.disk import processes


@contextlib.contextmanager
def small_pieces():
  """Makes leaves of a few hundred numbers many pieces, in this process."""
  with (
    mock.patch.object(plans, 'PIECE', 64),
    mock.patch.object(pieces, '_SIZES', (16, 64)),
  ):
    yield


def groups(count):
  """The group of each of so many processes."""
  first, others = {}, []
  for index in range(1, count):
    first[index], end = socket.socketpair()
    others.append(processes.Group(index, count, {0: end}))
  return [processes.Group(0, count, first), *others]


def run(count, work):
  """`work(group)` of each process; what it returned or raised, in their order."""

  def one(group):
    try:
      with group:
        return work(group)
    except BaseException as error:  # pylint: disable=broad-exception-caught
      return error

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    return list(pool.map(one, groups(count)))


def execute(count, recipe, out, **options):
  """`mj.execute` by so many processes; raises what one of them raises."""
  plan = mj.plan(recipe)
  reports = run(
    count, lambda group: mj.execute(plan, out, group=group, **options)
  )
  for report in reports:
    if isinstance(report, BaseException):
      raise report
  return reports
