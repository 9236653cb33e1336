# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which part of a merge is whose, where several processes do it.

The result is one line of pieces, parameter after parameter. Every process
takes a stretch of it that costs as much as any other: it reads the same
stretches of the sources and writes that of the result. So at most one
parameter is divided at each of the few ends of stretches.
"""

from typing import NamedTuple

from mergejax.core import axes as axes_lib
from mergejax.core import typing
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans


class Share(NamedTuple):
  """What one process merges of one parameter.

  Attributes:
    task: the parameter.
    first: number of its first piece; of a stack that is merged slice by slice,
      of its first slice.
    stop: number after that of the last.
    nbytes: of the result.
    divided: others merge the rest.
  """

  task: plans.Task
  first: int
  stop: int | None
  nbytes: int
  divided: bool

  @property
  def numbers(self) -> tuple[int, int | None]:
    """Of the first piece or slice, and after the last."""
    return self.first, self.stop


def whole(task: plans.Task) -> Share:
  """A parameter that one process merges."""
  return Share(task, 0, None, task.spec.nbytes, False)


def divide(plan: plans.Plan, count: int) -> list[dict[typing.Path, Share]]:
  """Divides a merge among processes.

  Args:
    plan: what is merged.
    count: of processes.

  Returns:
    `{path: share}` for each process, in the order of the plan.
  """
  if count == 1:
    return [{task.path: whole(task) for task in plan.tasks}]
  units = []
  for task in plan.tasks:
    cost = _cost(plan, task)
    if _has_pieces(plan, task):
      units += [
        (task, piece.number, piece.count, cost) for piece in pieces.cut(task)
      ]
    elif _has_slices(plan, task):
      slices = task.spec.shape[axes_lib.stacked(task.spec)[0]]
      size = task.spec.size // slices
      units += [(task, number, size, cost) for number in range(slices)]
    else:
      units.append((task, None, task.spec.size, cost))
  total = max(1, sum(size * cost for _, _, size, cost in units))
  result: list[dict[typing.Path, Share]] = [{} for _ in range(count)]
  before = 0
  for task, number, size, cost in units:
    # Where the middle of a unit lies on the line.
    owner = (2 * before + size * cost) * count // (2 * total)
    before += size * cost
    path, mine = task.path, result[min(count - 1, owner)]
    if number is None:
      mine[path] = whole(task)
      continue
    found = mine.get(path) or Share(task, number, number, 0, False)
    nbytes = found.nbytes + size * task.spec.dtype.itemsize
    mine[path] = found._replace(stop=number + 1, nbytes=nbytes)
  return [
    {path: _marked(share) for path, share in mine.items()} for mine in result
  ]


def describe(plan: plans.Plan, count: int) -> str:
  """Who merges how much, a line for each process."""
  lines = []
  for index, mine in enumerate(divide(plan, count)):
    nbytes = sum(share.nbytes for share in mine.values())
    divided = sum(share.divided for share in mine.values())
    lines.append(
      f'process {index:<2} writes {nbytes / 1e6:,.1f} MB of {len(mine)} arrays'
      + (f', {divided} of them divided' if divided else '')
    )
  return '\n'.join(lines)


def _marked(share):
  if share.nbytes == share.task.spec.nbytes:
    return whole(share.task)
  return share._replace(divided=True)


def _has_pieces(plan, task):
  """True if pieces of it can be read without the rest."""
  if not task.in_pieces or task.spec.size <= plans.PIECE:
    return False
  return all(
    2 * store.window_bytes(path) <= store.specs()[path].nbytes
    for store, path, _ in _places(plan, task)
  )


def _has_slices(plan, task):
  """True if it is a stack, the slices of which can be read one by one."""
  stack = axes_lib.stacked(task.spec)
  if task.in_pieces or not stack or task.spec.size <= plans.PIECE:
    return False
  return task.settings.method.of_slices and all(
    store.has_slices(path, stack[0] if like_leaf else 0)
    for store, path, like_leaf in _places(plan, task)
  )


def _places(plan, task):
  """`(store, path, whether it lies like the leaf)` of all that is read."""
  refs = [*task.inputs, *([task.base] if task.base else [])]
  places = [(plan.stores[name], path, True) for name, path in refs]
  if any(task.stats):
    needs = {need.name: need for need in task.settings.method.statistics}
    for store, names in zip(plan.stats, task.stats):
      for name, path in names.items():
        places.append((store, path, needs[name].is_leaf))
  return places


def _cost(plan, task):
  """Bytes that are read and written for an element."""
  refs = [*task.inputs, *([task.base] if task.base else [])]
  read = sum(plan.stores[m].specs()[p].dtype.itemsize for m, p in refs)
  for store, names in zip(plan.stats, task.stats):
    sizes = (store.specs()[path].nbytes for path in names.values())
    read += sum(sizes) // max(1, task.spec.size)
  return read + task.spec.dtype.itemsize
