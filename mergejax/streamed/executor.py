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
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from typing import Any

import jax
import numpy as np

import mergejax
from mergejax import checksums
from mergejax import errors
from mergejax.peft import fold
from mergejax.store import base as store_base
from mergejax.store import checkpoint
from mergejax.store import safetensors
from mergejax.streamed import pieces
from mergejax.streamed import plans
from mergejax.streamed import side_cars

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
    raise errors.UserError(
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
    self._work = out.with_name(f'.{out.name}.partial')
    specs = {task.path: task.spec for task in plan.tasks}
    limit = max_shard_bytes
    if self._single or format != 'safetensors':
      limit = sys.maxsize
    self._shards = safetensors.lay_out(specs, limit)
    self._specs = specs
    self._timers = pieces.Timers()
    self._done: set[str] = set()
    self._journal_lock = threading.Lock()
    self._stop = threading.Event()
    # What is done stays when this call fails, for the next one to continue.
    self._keep = False

  def run(self, resume, progress) -> Report:
    started = time.perf_counter()
    fingerprint = self._fingerprint()
    if self._out.exists():
      return self._finished_before(fingerprint)
    try:
      with self._locked():
        return self._run(resume, progress, fingerprint, started)
    except errors.UserError:
      if not self._keep:
        shutil.rmtree(self._work, ignore_errors=True)
      raise

  def _run(self, resume, progress, fingerprint, started):
    try:
      self._prepare(resume, fingerprint)
      left = [t for t in self._plan.tasks if t.path not in self._done]
      sources = [pathlib.Path(name) for name in fingerprint['sources']]
      checksums.SUMS.start(sources)
      self._check_repeated()
      self._merge(left, progress)
      sums = {str(file): checksums.SUMS.of(file) for file in sources}
      self._finish(fingerprint, sums)
    except Exception as error:
      if not store_base.is_write_failure(error):
        raise
      self._keep = True
      raise errors.UserError(
        f'Could not write {self._out}: '
        f'{store_base.write_failure_reason(error)}. The sources are untouched '
        f'and what is done is kept in {self._work}: free some space and run '
        'the same command again to continue.'
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

  def _fingerprint(self) -> dict[str, Any]:
    """What makes two calls the same merge: recipe, sources, layout, version."""
    sources = {}
    stores = [*self._plan.stores.values(), *self._plan.stats]
    for file in sorted({f for store in stores for f in store.files()}):
      status = file.stat()
      sources[str(file)] = [status.st_size, status.st_mtime_ns]
    tasks = hashlib.sha256()
    for task in self._plan.tasks:
      tasks.update(repr(dataclasses.astuple(task)).encode())
    return {
      'recipe': json.loads(json.dumps(self._plan.recipe.data, default=str)),
      'tasks': tasks.hexdigest(),
      'format': self._format,
      'files': [shard.file for shard in self._shards],
      'sources': sources,
      'mergejax': mergejax.__version__,
    }

  def _finished_before(self, fingerprint) -> Report:
    manifest = self._manifest_file(self._out)
    if manifest.is_file():
      found = checkpoint.read_json(manifest)
      if found.get('fingerprint') == _digest(fingerprint):
        return Report(self._out, 0, 0.0, {}, 0, 0)
    raise errors.UserError(
      f'{self._out} already exists and is not the result of this recipe on '
      'these sources. Choose another name, or remove it.'
    )

  @contextlib.contextmanager
  def _locked(self):
    """One merge at a time works towards an output."""
    try:
      self._work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise errors.UserError(
        f'Cannot create {self._work}: {error.strerror}.'
      ) from error
    with open(self._work / 'lock', 'wb') as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        self._keep = True
        raise errors.UserError(
          f'Another merge is writing {self._out} at this moment.'
        ) from error
      yield

  def _prepare(self, resume, fingerprint):
    """Finds what an interrupted call left, or lays the files out anew."""
    state = self._work / 'state.json'
    wanted = {'fingerprint': _digest(fingerprint), 'boot': _boot()}
    found = checkpoint.read_json(state) if state.is_file() else None
    if resume and found == wanted:
      journal = self._work / 'journal'
      if journal.is_file():
        # A line that was cut short has no newline and does not count.
        lines = journal.read_text(encoding='utf-8').split('\n')[:-1]
        self._done = set(lines) & set(self._specs)
    else:
      for child in self._work.iterdir():
        if child.name != 'lock':
          shutil.rmtree(child) if child.is_dir() else child.unlink()
    (self._work / 'result').mkdir(exist_ok=True)
    self._check_space()
    for shard in self._shards:
      file = self._work / 'result' / shard.file
      if not file.exists() or file.stat().st_size != shard.nbytes:
        with open(file, 'wb') as stream:
          stream.write(shard.header)
          stream.truncate(shard.nbytes)
        self._done -= set(shard.offsets)
    side_cars.write_text(state, json.dumps(wanted))

  def _check_space(self):
    done = sum(self._specs[path].nbytes for path in self._done)
    needed = self._plan.write_bytes - done
    free = shutil.disk_usage(self._work).free
    if needed > free:
      self._keep = bool(done)
      raise errors.UserError(
        f'{self._out} needs {needed / 1e6:,.1f} MB more and the disk has '
        f'{free / 1e6:,.1f} MB free. The sources are untouched; free some '
        'space, or write elsewhere, and run this again.'
      )

  def _check_repeated(self):
    """Parameters that should repeat another one do."""
    for name, aliases in self._plan.repeated.items():
      path = name.split('+')[0]
      path = self._plan.recipe.base if fold.is_adapter(path) else path
      store = checkpoint.open_checkpoint(path)
      for alias, path in aliases.items():
        a = np.empty(plans.PIECE, store.specs()[alias].dtype)
        b = np.empty_like(a)
        size = store.specs()[path].size
        for start in range(0, size, plans.PIECE):
          count = min(plans.PIECE, size - start)
          store.read_into(alias, start, a[:count])
          store.read_into(path, start, b[:count])
          if a[:count].tobytes() != b[:count].tobytes():
            raise errors.UserError(
              f'{name}: {alias} should repeat {path} (tie_word_embeddings) but '
              'differs from it. Set tie_word_embeddings to false in its '
              'config.json if the head is its own.'
            )

  # The work ------------------------------------------------------------------

  def _merge(self, tasks, progress):
    """Merges parameters, several at a time, each by one thread."""
    total = self._plan.write_bytes
    before = total - sum(task.spec.nbytes for task in tasks)
    state = {'bytes': before}
    local = threading.local()
    notes = self._tree_looks(tasks)
    place = {}
    with contextlib.ExitStack() as stack:
      for shard in self._shards:
        file = os.open(self._work / 'result' / shard.file, os.O_RDWR)
        stack.callback(os.close, file)
        place.update({p: (file, at) for p, at in shard.offsets.items()})
      journal = os.open(
        self._work / 'journal', os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
      )
      stack.callback(os.close, journal)

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

        if self._plan.in_pieces(task):
          if not hasattr(local, 'buffers'):
            local.buffers = {}
          leaf = pieces.Leaf(self._plan, task, local.buffers, self._timers)
          if task.method is not None:
            if task.path in notes:
              leaf.marks = notes[task.path]
            leaf.look()
          leaf.merge(write)
        else:
          pieces.merge_whole(self._plan, task, write, self._timers)
        with self._journal_lock:
          os.write(journal, f'{task.path}\n'.encode())
          state['bytes'] += task.spec.nbytes
          if progress is not None:
            progress(state['bytes'], total)

      with concurrent.futures.ThreadPoolExecutor(plans.WORKERS) as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
          for future in concurrent.futures.as_completed(futures):
            future.result()
        except BaseException:
          self._stop.set()
          pool.shutdown(cancel_futures=True)
          raise

  def _tree_looks(self, left) -> dict[str, list]:
    """Marks of parameters after the looks that take in the whole model."""
    if not left:
      return {}
    tasks = [t for t in self._plan.tasks if t.method is not None]
    groups: dict[str, list] = {}
    for task in tasks:
      key = repr((task.method, sorted(task.options.items())))
      groups.setdefault(key, []).append(task)
    notes = {}
    for group in groups.values():
      looks = group[0].build().looks
      if not any(look.scope == 'tree' for look in looks):
        continue
      buffers: dict = {}
      leaves = [
        pieces.Leaf(self._plan, task, buffers, self._timers) for task in group
      ]
      for i, look in enumerate(looks):
        if look.scope != 'tree':
          continue
        if look.ranks is not None:
          found = pieces.rank(i, leaves)
        else:
          combine = np.maximum if look.combine == 'max' else np.add
          total = None
          for leaf in leaves:
            own = leaf.total(i)
            total = own if total is None else jax.tree.map(combine, total, own)  # fmt: skip
          found = [total] * len(leaves)
        for leaf, own in zip(leaves, found):
          leaf.note(i, own)
      notes.update({t.path: leaf.marks for t, leaf in zip(group, leaves)})
    return notes

  # After ---------------------------------------------------------------------

  def _finish(self, fingerprint, sums):
    result = self._work / 'result'
    if self._format != 'safetensors':
      result = self._converted(result)
    manifest = {
      'fingerprint': _digest(fingerprint),
      'mergejax': mergejax.__version__,
      'method': self._plan.recipe.method,
      'recipe': fingerprint['recipe'],
      'seed': self._plan.recipe.seed,
      'format': self._format,
      'versions': _versions(),
      'sources': sums,
      'settings': [
        {
          'parameters': [t.path for t in group],
          'method': group[0].method,
          'options': {k: v for k, v in group[0].options.items()},
          'weights': list(group[0].weights),
        }
        for group in self._groups()
      ],
      'remarks': list(self._plan.remarks),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True, default=str) + '\n'
    if self._single:
      side_cars.write_text(self._manifest_file(self._out), text)
      names = [shard.file for shard in self._shards]
      file = result if result.is_file() else result / names[0]
      os.replace(file, self._out)
    else:
      side_cars.write_text(result / MANIFEST, text)
      index = safetensors.index_of(self._shards, self._specs)
      if index is not None and self._format == 'safetensors':
        side_cars.write_text(result / safetensors.INDEX, index)
      side_cars.write(self._plan, result)
      os.rename(result, self._out)
    shutil.rmtree(self._work)

  def _converted(self, result):
    """The result in another format, written from memory."""
    leaves = safetensors.SafetensorsStore(result).leaves(list(self._specs))
    target = self._work / f'converted{self._out.suffix if self._single else ""}'
    checkpoint.save_checkpoint(
      target, leaves, format=self._format, overwrite=True
    )
    return target

  def _manifest_file(self, out):
    if self._single:
      return out.with_name(f'{out.name}.{MANIFEST}')
    return out / MANIFEST

  def _groups(self):
    groups: dict[str, list] = {}
    for task in self._plan.tasks:
      key = repr((task.method, sorted(task.options.items()), task.weights))
      groups.setdefault(key, []).append(task)
    return groups.values()


def _digest(fingerprint: Mapping[str, Any]) -> str:
  text = json.dumps(fingerprint, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


def _boot() -> str:
  """Names this run of the machine: what was written before a crash of it may
  not have reached the disk, whatever the journal says."""
  file = pathlib.Path('/proc/sys/kernel/random/boot_id')
  return file.read_text().strip() if file.is_file() else ''


def _versions() -> dict[str, str]:
  return {
    'python': '.'.join(map(str, sys.version_info[:3])),
    'jax': jax.__version__,
    'numpy': np.__version__,
  }
