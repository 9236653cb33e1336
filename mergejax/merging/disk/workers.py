# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The work of a merge: the shares of this process, by a few threads.

Passes over the whole model come first, then those over parameters that are
divided among processes; what is left of them, and all other parameters, needs
no word of another process.
"""

from collections.abc import Callable, Collection, Sequence
import concurrent.futures
import contextlib
import os
import threading

import numpy as np

from mergejax.checkpoints import safetensors
from mergejax.core import stop as stop_lib
from mergejax.core import typing
from mergejax.merging import engine
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans
from mergejax.merging.disk import processes
from mergejax.merging.disk import programs
from mergejax.merging.disk import ranks
from mergejax.merging.disk import shares as shares_lib
from mergejax.merging.disk import together
from mergejax.merging.disk import whole
from mergejax.merging.disk import work_folder


class Workers:
  """Threads that merge what is this process's of a plan."""

  def __init__(
    self,
    plan: plans.Plan,
    folder: work_folder.WorkFolder,
    shards: Sequence[safetensors.Shard],
    group: processes.Group,
    timers: pieces.Timers,
  ):
    """Divides the work.

    Args:
      plan: what is merged.
      folder: where it is merged, prepared before `merge` is called.
      shards: the files there.
      group: the processes that merge it.
      timers: of this process.
    """
    self._plan = plan
    self._folder = folder
    self._shards = shards
    self._group = group
    self._timers = timers
    self._shares = shares_lib.divide(plan, group.count)
    self._stop = threading.Event()
    # What `_passes_together` found.
    self._known: dict[typing.Path, list] = {}
    self._concluded: set[typing.Path] = set()

  @property
  def mine(self) -> dict[typing.Path, shares_lib.Share]:
    """The shares of this process."""
    return self._shares[self._group.index]

  def merge(
    self,
    left: Sequence[shares_lib.Share],
    pending: Collection[typing.Path],
    progress: Callable[[int, int], None] | None = None,
  ) -> None:
    """Merges shares, several at a time, each by one thread.

    Args:
      left: of this process, what it has not merged yet.
      pending: parameters that some process has not merged yet.
      progress: called with (bytes done, bytes in all) of this process.

    Raises:
      UserError: a source or the result holds numbers that are not finite.
      errors.Stopped: this process, or another one, was asked to stop.
      processes.Lost: another process failed or is gone.
    """
    total = sum(share.nbytes for share in self.mine.values())
    before = total - sum(share.nbytes for share in left)
    state, lock, local = {'bytes': before}, threading.Lock(), threading.local()
    self._known, self._concluded = self._passes_together(pending)
    place = {}
    with contextlib.ExitStack() as stack:
      for shard in self._shards:
        # Not for reading: of what others write beside it nothing must be kept.
        file = os.open(self._folder.result / shard.file, os.O_WRONLY)
        stack.callback(os.close, file)
        place.update({p: (file, at) for p, at in shard.offsets.items()})
      files = sorted({file for file, _ in place.values()})
      stack.enter_context(work_folder.writing_behind(files))

      def run(share):
        if self._stop.is_set():
          return
        if not hasattr(local, 'buffers'):
          local.buffers = {}
        write = self._writer(share.task, *place[share.task.path])
        self._merge_share(share, local.buffers, write)
        self._folder.note(share.task.path)
        with lock:
          state['bytes'] += share.nbytes
          if progress is not None:
            progress(state['bytes'], total)

      stop = stack.enter_context(stop_lib.StopRequest())
      with concurrent.futures.ThreadPoolExecutor(plans.WORKERS) as pool:
        futures = [pool.submit(run, share) for share in left]
        try:
          for future in concurrent.futures.as_completed(futures):
            future.result()
            stop.check(f'Stopped; what is done is in {self._folder.path}.')
        except BaseException:
          self._stop.set()
          pool.shutdown(cancel_futures=True)
          raise
      if self._group.count > 1:  # another machine cannot wait for this one's
        for file in files:
          os.fsync(file)

  def _merge_share(self, share, buffers, write):
    """Merges a share, in pieces if it can be."""
    task = share.task
    if not task.in_pieces:
      numbers = share.numbers if share.divided else None
      whole.merge(self._plan, task, write, self._timers, numbers)
      return
    leaf = pieces.Leaf(self._plan, task, buffers, self._timers, share.numbers)
    if task.path in self._known:
      leaf.contexts = self._known[task.path]
    if task.settings is not None and task.path not in self._concluded:
      leaf.first_passes()
    leaf.merge(write)

  def _writer(self, task, file, at):
    """`write(start, array)` of a parameter into a file, from a position on."""
    size = task.spec.dtype.itemsize

    def write(start, array):
      self._group.check()
      view = memoryview(np.ascontiguousarray(array).view(np.uint8))
      position = at + start * size
      while view:
        count = os.pwrite(file, view, position)
        view, position = view[count:], position + count

    return write

  def _passes_together(self, pending) -> tuple[dict[str, list], set[str]]:
    """Contexts after the passes over the whole model, and over divided leaves.

    Args:
      pending: parameters that some process has not merged yet.

    Returns:
      `({path: contexts}, paths whose first passes are all done)`.
    """
    if not pending:
      return {}, set()
    buffers: dict = {}
    leaves: dict[str, pieces.Leaf] = {}
    groups: dict[programs.Settings, list[pieces.Leaf]] = {}
    divided = [
      path
      for path, share in self._divided()
      if share.task.in_pieces and share.task.settings is not None
    ]
    for task in self._plan.tasks:
      path, settings = task.path, task.settings
      if settings is None:
        continue
      tree = settings.method.has_tree_passes
      if tree or (path in divided and path in pending):
        mine = self.mine.get(path)
        leaves[path] = pieces.Leaf(
          self._plan, task, buffers, self._timers,
          (0, 0) if mine is None else mine.numbers,
        )  # fmt: skip
      if tree:
        groups.setdefault(settings, []).append(leaves[path])
    jobs = [(settings.method, group) for settings, group in groups.items()]
    divided = [path for path in divided if path in leaves]
    if self._group.count == 1:
      for method, members in jobs:
        engine.run_first_passes(method, members, 'tree', ranks.rank)
    else:
      together.first_passes(self._group, jobs, 'tree')
      jobs = [(leaves[path].method, [leaves[path]]) for path in divided]
      together.first_passes(self._group, jobs, 'leaf')
    return {p: leaf.contexts for p, leaf in leaves.items()}, set(divided)

  def _divided(self):
    """`{path: a share}` of parameters that several processes merge."""
    return {
      path: share
      for mine in self._shares
      for path, share in mine.items()
      if share.divided
    }.items()
