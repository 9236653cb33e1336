# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: reads, merges and writes at the same time, and can be killed.

All work happens in a hidden folder beside the result, `.NAME.partial`. Every
parameter has its place in the output files before the first is merged; a
journal names those that are done. Killed at any moment, the same call finds
the folder, merges what is missing and gives the same bytes. The result appears
under its name in one rename, complete.
"""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

import mergejax
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.core import identity as identity_lib
from mergejax.core import stop as stop_lib
from mergejax.merging import engine
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans
from mergejax.merging.disk import programs
from mergejax.merging.disk import ranks
from mergejax.merging.disk import side_cars
from mergejax.merging.disk import work_folder

# Beside the weights: every setting, the seed, and the sums of all sources.
MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Report:
  """What a merge did.

  Attributes:
    out: where the result is.
    computed: how many parameters were merged in this call; the others were
      done before it.
    seconds: wall time of this call.
    phases: seconds reading, computing and writing, over all threads.
    read_bytes: of the sources.
    written_bytes: of the result.
  """

  out: pathlib.Path
  computed: int
  seconds: float
  phases: Mapping[str, float]
  read_bytes: int
  written_bytes: int

  def describe(self) -> str:
    """The report in words."""
    if not self.computed:
      return f'{self.out} is complete; nothing was computed.'
    moved = (self.read_bytes + self.written_bytes) / 1e6
    phases = ', '.join(f'{n} {s:.2f} s' for n, s in self.phases.items())
    return (
      f'{self.out}: {self.computed} parameters in {self.seconds:.2f} s, '
      f'{moved / self.seconds:,.0f} MB/s read and written ({phases} over '
      f'{plans.WORKERS} threads)'
    )


def execute(
  plan: plans.Plan,
  out: os.PathLike | str,
  *,
  format: str | None = None,  # pylint: disable=redefined-builtin
  resume: bool = True,
  max_shard_bytes: int = 5 * 10**9,
  progress: Callable[[int, int], None] | None = None,
) -> Report:
  """Runs a plan.

  Args:
    plan: from `plan`.
    out: a directory to create, or a `.safetensors` or `.npz` file.
    format: 'safetensors', 'orbax', 't5x' or 'npz'; by default what the recipe
      or the suffix of `out` says, else that of the reference model. Formats
      other than safetensors are written at the end from memory.
    resume: continue what an interrupted call left; otherwise start afresh.
    max_shard_bytes: size of the files of a safetensors directory.
    progress: called with (bytes done, bytes in all).

  Returns:
    A report.

  Raises:
    UserError: `out` exists and is not this merge, the disk is too small or
      full, a source holds numbers that are not finite. On a full disk what is
      done is kept for the same call to continue; otherwise nothing is left.
  """
  out = pathlib.Path(out).expanduser()
  if not out.name:  # '.' and '/': nothing can be put beside them
    out = out.resolve()
    files_lib.check_new(out)
  format = result_format(plan, out, format)
  return _Execution(plan, out, format, max_shard_bytes).run(resume, progress)


def result_format(
  plan: plans.Plan,
  out: pathlib.Path,
  format: str | None = None,  # pylint: disable=redefined-builtin
) -> str:
  """The format that a result will have; see `execute`."""
  by_suffix = {'.safetensors': 'safetensors', '.npz': 'npz'}.get(out.suffix)
  chosen = format or plan.recipe.format or by_suffix
  if chosen is None:
    found = plan.stores[plan.reference].provenance['format']
    chosen = found if found in checkpoint.FORMATS else 'safetensors'
    chosen = 'safetensors' if chosen == 'npz' else chosen
  if chosen not in checkpoint.FORMATS:
    raise errors.CheckpointError(
      errors.near(chosen, checkpoint.FORMATS, 'checkpoint format')
    )
  return chosen


class _Execution:
  """One merge on its way from a plan to a complete result."""

  def __init__(self, plan, out, format, max_shard_bytes):  # pylint: disable=redefined-builtin
    self._plan = plan
    self._out = out
    self._format = format
    self._single = out.suffix in ('.safetensors', '.npz')
    self._work = work_folder.WorkFolder(out)
    specs = {task.path: task.spec for task in plan.tasks}
    limit = max_shard_bytes
    if self._single or format != 'safetensors':
      limit = sys.maxsize
    self._shards = safetensors.lay_out(specs, limit, with_axes=self._single)
    self._specs = specs
    self._timers = pieces.Timers()
    self._stop = threading.Event()

  def run(self, resume, progress) -> Report:
    started = time.perf_counter()
    identity = self._identity()
    before = self._finished_before(identity)
    if before is not None:
      return before
    with self._work.locked():
      # Another process may have finished it since.
      before = self._finished_before(identity)
      if before is not None:
        self._work.remove()
        return before
      return self._run(resume, progress, identity, started)

  def _run(self, resume, progress, identity, started):
    sizes = {path: spec.nbytes for path, spec in self._specs.items()}
    try:
      done = self._work.prepare(
        identity, self._shards, sizes, resume, anonymous=self._plan.anonymous
      )
      left = [t for t in self._plan.tasks if t.path not in done]
      sources = [pathlib.Path(name) for name in identity['work']['sources']]
      checksums.SUMS.start(sources)
      self._check_repeated()
      self._merge(left, progress)
      sums = {str(file): checksums.SUMS.of(file) for file in sources}
      self._finish(identity, sums)
    except Exception as error:
      if not files_lib.is_write_failure(error):
        raise
      self._work.keep = True
      raise errors.CheckpointError(
        f'Could not write {self._out}: '
        f'{files_lib.write_failure_reason(error)}. The sources are untouched '
        f'and what is done is kept in {self._work.path}: free some space and '
        'run the same command again to continue.'
      ) from error
    return Report(
      self._out,
      max(len(left), 1),
      time.perf_counter() - started,
      dict(self._timers.seconds),
      self._plan.read_bytes,
      self._plan.write_bytes,
    )

  # Before --------------------------------------------------------------------

  def _identity(self) -> dict[str, Any]:
    """What makes two calls the same merge: recipe, sources, layout, code.

    Small files count by what they say: tokenizers decide where rows lie, and
    the rest stands beside the result.
    """
    sources = {}
    stores = [*self._plan.stores.values(), *self._plan.stats]
    for file in sorted({f for store in stores for f in store.files()}):
      status = file.stat()
      sources[str(file)] = [status.st_size, status.st_mtime_ns]
    return identity_lib.record({
      'plan': self._plan.identity,
      'format': self._format,
      'files': [[shard.file, shard.nbytes] for shard in self._shards],
      'sources': sources,
      'beside': side_cars.digests(self._plan),
    })  # fmt: skip

  def _finished_before(self, identity) -> Report | None:
    """A report if the result is there already, None if nothing is."""
    if not self._out.exists():
      return None
    manifest = self._manifest_file(self._out)
    found = checkpoint.read_json(manifest) if manifest.is_file() else {}
    if found.get('identity') != identity_lib.digest(identity['work']):
      raise errors.CheckpointError(
        f'{self._out} already exists and is not the result of this recipe on '
        'these sources. Choose another name, or remove it.'
        + (
          ' (A Merge from Python is known again by the `identity=` of `plan`.)'
          if self._plan.anonymous
          else ''
        )
      )
    lines = errors.differences(found.get('code') or {}, identity['code'])
    if lines:
      raise errors.CheckpointError(
        f'{self._out} is the result of this recipe on these sources, but was '
        'made by another version of the code, which may round otherwise:\n'
        f'{errors.listed(lines)}\nRemove it to merge again, or keep it.'
      )
    return Report(self._out, 0, 0.0, {}, 0, 0)

  def _check_repeated(self):
    """Parameters that should repeat another one do."""
    for name, aliases in self._plan.repeated.items():
      store = checkpoint.open_checkpoint(name)
      for alias, path in aliases.items():
        a = np.empty(plans.PIECE, store.specs()[alias].dtype)
        b = np.empty_like(a)
        size = store.specs()[path].size
        kind = lambda spec: (spec.shape, spec.dtype)
        same = kind(store.specs()[alias]) == kind(store.specs()[path])
        for start in range(0, size, plans.PIECE):
          count = min(plans.PIECE, size - start)
          if same:
            store.read_into(alias, start, a[:count])
            store.read_into(path, start, b[:count])
          if not same or a[:count].tobytes() != b[:count].tobytes():
            raise errors.CheckpointError(
              f'{name}: {alias} should repeat {path} but differs from it. If '
              'it is of its own, set tie_word_embeddings to false in the '
              'config.json there, and `untie: true` in the recipe.'
            )

  # The work ------------------------------------------------------------------

  def _merge(self, tasks, progress):
    """Merges parameters, several at a time, each by one thread."""
    total = self._plan.write_bytes
    before = total - sum(task.spec.nbytes for task in tasks)
    state = {'bytes': before}
    local, lock = threading.local(), threading.Lock()
    contexts = self._tree_passes(tasks)
    place = {}
    with contextlib.ExitStack() as stack:
      for shard in self._shards:
        file = os.open(self._work.result / shard.file, os.O_RDWR)
        stack.callback(os.close, file)
        place.update({p: (file, at) for p, at in shard.offsets.items()})
      files = sorted({file for file, _ in place.values()})
      stack.enter_context(work_folder.writing_behind(files))

      def run(task):
        if self._stop.is_set():
          return
        file, at = place[task.path]
        size = task.spec.dtype.itemsize

        def write(start, array):
          view = memoryview(np.ascontiguousarray(array).view(np.uint8))
          position = at + start * size
          while view:
            count = os.pwrite(file, view, position)
            view, position = view[count:], position + count

        if task.in_pieces:
          if not hasattr(local, 'buffers'):
            local.buffers = {}
          leaf = pieces.Leaf(self._plan, task, local.buffers, self._timers)
          if task.settings is not None:
            if task.path in contexts:
              leaf.contexts = contexts[task.path]
            leaf.first_passes()
          leaf.merge(write)
        else:
          pieces.merge_whole(self._plan, task, write, self._timers)
        self._work.note(task.path)
        with lock:
          state['bytes'] += task.spec.nbytes
          if progress is not None:
            progress(state['bytes'], total)

      stop = stack.enter_context(stop_lib.StopRequest())
      with concurrent.futures.ThreadPoolExecutor(plans.WORKERS) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
          for future in concurrent.futures.as_completed(futures):
            future.result()
            stop.check(f'Stopped; what is done is in {self._work.path}.')
        except BaseException:
          self._stop.set()
          pool.shutdown(cancel_futures=True)
          raise

  def _tree_passes(self, left) -> dict[str, list]:
    """Contexts of parameters after the passes over the whole model."""
    if not left:
      return {}
    tasks = [t for t in self._plan.tasks if t.settings is not None]
    groups: dict[programs.Settings, list] = {}
    for task in tasks:
      groups.setdefault(task.settings, []).append(task)
    contexts = {}
    for settings, group in groups.items():
      method = settings.method
      if not method.has_tree_passes:
        continue
      buffers: dict = {}
      leaves = [
        pieces.Leaf(self._plan, task, buffers, self._timers) for task in group
      ]
      engine.run_first_passes(method, leaves, 'tree', ranks.rank)
      contexts.update({t.path: leaf.contexts for t, leaf in zip(group, leaves)})
    return contexts

  # After ---------------------------------------------------------------------

  def _finish(self, identity, sums):
    result = self._work.result
    if self._format != 'safetensors':
      result = self._converted(result)
    manifest = {
      'identity': identity_lib.digest(identity['work']),
      'code': identity['code'],
      'mergejax': mergejax.__version__,
      'method': self._plan.recipe.entry.name,
      'recipe': self._plan.recipe.data,
      'seed': self._plan.recipe.seed,
      'format': self._format,
      'versions': _versions(),
      'sources': sums,
      'settings': [
        {
          'parameters': [t.path for t in group],
          'method': group[0].method,
          'options': dict(group[0].options),
          'weights': list(group[0].weights),
        }
        for group in self._plan.groups()
      ],
      'remarks': list(self._plan.remarks),
    }
    text = json.dumps(identity_lib.canonical(manifest), indent=2) + '\n'
    if self._single:
      side_cars.write_text(self._manifest_file(self._out), text)
      names = [shard.file for shard in self._shards]
      file = result if result.is_file() else result / names[0]
      files_lib.sync(file)
      os.replace(file, self._out)
    else:
      side_cars.write_text(result / MANIFEST, text)
      index = safetensors.index_of(self._shards, self._specs)
      if index is not None and self._format == 'safetensors':
        side_cars.write_text(result / safetensors.INDEX, index)
      side_cars.write(self._plan, result)
      files_lib.sync(result)
      os.rename(result, self._out)
    files_lib.sync(self._out.parent, deep=False)
    self._work.remove()

  def _converted(self, result):
    """The result in another format, written from memory."""
    leaves = safetensors.SafetensorsStore(result).leaves(list(self._specs))
    target = (
      self._work.path / f'converted{self._out.suffix if self._single else ""}'
    )
    checkpoint.save_checkpoint(
      target, leaves, format=self._format, overwrite=True
    )
    return target

  def _manifest_file(self, out):
    if self._single:
      return out.with_name(f'{out.name}.{MANIFEST}')
    return out / MANIFEST


def _versions() -> dict[str, str]:
  return {
    'python': '.'.join(map(str, sys.version_info[:3])),
    'jax': jax.__version__,
    'numpy': np.__version__,
  }
