# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a plan: reads, merges and writes at the same time, and can be killed.

All work happens in a hidden folder beside the result, `.NAME.partial`. Every
parameter has its place in the output files before the first is merged; a
journal names those that are done. Killed at any moment, the same call finds
the folder, merges what is missing and gives the same bytes. The result appears
under its name in one rename, complete.

Several processes on one file system do the same together: each merges its
share, in a journal of its own, into the same files; the first one lays them out
and gives them their name when all have done theirs.
"""

from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

import mergejax
from mergejax.adapters import changes
from mergejax.adapters import written
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import chunked
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import extract
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.core import identity as identity_lib
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans
from mergejax.merging.disk import processes
from mergejax.merging.disk import reports
from mergejax.merging.disk import side_cars
from mergejax.merging.disk import work_folder
from mergejax.merging.disk import workers
from mergejax.merging.recipes import adapter_words

# Beside the weights: every setting, the seed, and the sums of all sources.
MANIFEST = 'manifest.json'
# What the first process says if the result was there before.
_FINISHED = b'finished'


def execute(
  plan: plans.Plan,
  out: os.PathLike | str,
  *,
  format: str | None = None,  # pylint: disable=redefined-builtin
  resume: bool = True,
  max_shard_bytes: int = 5 * 10**9,
  progress: Callable[[int, int], None] | None = None,
  group: processes.Group | None = None,
) -> reports.Report:
  """Runs a plan.

  Args:
    plan: from `plan`.
    out: a directory to create, or a `.safetensors` or `.npz` file.
    format: 'safetensors', 'orbax', 't5x' or 'npz'; by default what the recipe
      or the suffix of `out` says, else that of the reference model. Formats
      other than safetensors are written at the end from memory.
    resume: continue what an interrupted call left; otherwise start afresh.
    max_shard_bytes: size of the files of a safetensors directory.
    progress: called with (bytes done, bytes in all) of this process.
    group: the processes that do it together, each of which calls this with the
      same arguments; this one alone by default. The files of the result are
      the same, to the last byte.

  Returns:
    A report.

  Raises:
    UserError: `out` exists and is not this merge, the disk is too small or
      full, a source holds numbers that are not finite. On a full disk what is
      done is kept for the same call to continue; otherwise nothing is left.
    processes.Lost: another process failed or is gone. What is done is kept.
  """
  out = pathlib.Path(out).expanduser()
  if not out.name:  # '.' and '/': nothing can be put beside them
    out = out.resolve()
    files_lib.check_new(out)
  format = result_format(plan, out, format)
  group = processes.Group() if group is None else group
  if group.count > 1:
    check_divisible(plan, format)
  execution = _Execution(plan, out, format, max_shard_bytes, group)
  return execution.run(resume, progress)


def check_divisible(plan: plans.Plan, format: str) -> None:  # pylint: disable=redefined-builtin
  """Refuses what several processes cannot do together.

  Raises:
    UserError: the format is one file that one process writes; or the processes
      cannot know that they have the same method.
  """
  if format in ('npz', adapter_words.FORMAT):
    what = 'one .npz archive' if format == 'npz' else 'one adapter'
    raise errors.CheckpointError(
      f'Several processes cannot write {what} together: choose '
      '`--format` safetensors, orbax or t5x, or merge without --multiprocess.'
    )
  if plan.anonymous:
    raise errors.RecipeError(
      'Several processes cannot know that each has the same Merge without a '
      'name: give `plan` an `identity=` that changes whenever its numbers do.'
    )


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
  if plan.recipe.of_adapters:
    if chosen != adapter_words.FORMAT or by_suffix:
      raise errors.RecipeError(
        f'This plan makes an adapter, which is a directory in its own format, '
        f'not {by_suffix or chosen}. To fold the adapters into their base, leave '
        '`format: adapter` out of the recipe.'
      )
    return chosen
  if chosen not in checkpoint.FORMATS:
    raise errors.CheckpointError(
      errors.near(chosen, checkpoint.FORMATS, 'checkpoint format')
    )
  return chosen


class _Execution:
  """One merge on its way from a plan to a complete result."""

  def __init__(self, plan, out, format, max_shard_bytes, group):  # pylint: disable=redefined-builtin
    self._plan = plan
    self._out = out
    self._format = format
    self._group = group
    self._single = out.suffix in ('.safetensors', '.npz')
    self._work = work_folder.WorkFolder(out)
    specs = {task.path: task.spec for task in plan.tasks}
    limit = max_shard_bytes
    if self._single or format != 'safetensors':
      limit = sys.maxsize
    self._shards = safetensors.lay_out(specs, limit, with_axes=self._single)
    self._specs = specs
    self._timers = pieces.Timers()
    self._residuals: list[extract.Residual] = []
    self._workers = workers.Workers(
      plan, self._work, self._shards, group, self._timers
    )

  def run(self, resume, progress) -> reports.Report:
    started = time.perf_counter()
    identity = self._identity()
    self._group.check_same(identity)
    if self._group.index:
      if self._group.gather()[0] == _FINISHED:
        return self._nothing_to_do()
      return self._run(resume, progress, identity, started)
    before = self._finished_before(identity)
    if before is None:
      with self._work.locked():
        # Another process may have finished it since.
        before = self._finished_before(identity)
        if before is None:
          return self._run(resume, progress, identity, started)
        self._work.remove()
    self._group.gather(_FINISHED)
    return before

  def _run(self, resume, progress, identity, started):
    try:
      done = self._prepare(identity, resume)
      left = [
        share for path, share in self._workers.mine.items() if path not in done
      ]
      paths = [share.task.path for share in left]
      pending = set().union(*self._group.gather_json(paths))
      sources = self._sources(identity)
      checksums.SUMS.start(sources)
      self._check_repeated()
      self._workers.merge(left, pending, progress)
      sums = {str(file): checksums.SUMS.of(file) for file in sources}
      read_by = self._finish(identity, sums)
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
    return reports.Report(
      self._out,
      len(pending),
      time.perf_counter() - started,
      dict(self._timers.seconds),
      self._plan.read_bytes,
      self._plan.write_bytes,
      read_by,
      self._residuals,
    )

  # Before --------------------------------------------------------------------

  def _prepare(self, identity, resume) -> set[str]:
    """What is done already; the first process lays the files out."""
    group = self._group
    sizes = {path: share.nbytes for path, share in self._workers.mine.items()}
    if group.index == 0:
      done = self._work.prepare(
        identity, self._shards, sizes, resume, anonymous=self._plan.anonymous,
        processes=group.count,
        others=self._plan.write_bytes - sum(sizes.values()),
      )  # fmt: skip
      group.gather()  # which the others wait for in `run`
      return done
    return self._work.follow(identity, sizes, group.index, group.count)

  def _sources(self, identity) -> list[pathlib.Path]:
    """Files whose sums this process finds: of each size its share."""
    found = identity['work']['sources']
    files = sorted(found, key=lambda file: found[file], reverse=True)
    return [
      pathlib.Path(file)
      for file in files[self._group.index :: self._group.count]
    ]

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

  def _finished_before(self, identity) -> reports.Report | None:
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
    return self._nothing_to_do()

  def _nothing_to_do(self):
    return reports.Report(self._out, 0, 0.0, {}, 0, 0)

  def _check_repeated(self):
    """Parameters that should repeat another one do; each process looks at some."""
    every = list(self._plan.repeated.items())
    for name, aliases in every[self._group.index :: self._group.count]:
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

  # After ---------------------------------------------------------------------

  def _finish(self, identity, sums) -> list[int]:
    """Completes the result when all processes have done their share.

    Returns:
      Bytes that each of them asked of the sources.
    """
    told = self._group.gather_json([sums, self._timers.read_bytes])
    if self._group.count > 1 and self._format in chunked.FORMATS:
      self._convert_together()
    if self._group.index == 0:
      sums = {
        file: digest for found, _ in told for file, digest in found.items()
      }
      self._complete(identity, dict(sorted(sums.items())))
      with contextlib.suppress(processes.Lost):  # it is complete nonetheless
        self._group.gather()
    else:
      self._group.gather()
    return [count for _, count in told]

  def _complete(self, identity, sums):
    result = self._work.result
    if self._format != 'safetensors':
      result = self._target
      if self._group.count == 1:
        self._convert()
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
    if self._residuals:
      manifest['residuals'] = {r.path: r.share for r in self._residuals}
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

  @property
  def _target(self):
    """Where the result is in another format, before it has its name."""
    suffix = self._out.suffix if self._single else ''
    return self._work.path / f'converted{suffix}'

  def _convert(self):
    """Writes the result in another format, from memory."""
    store = safetensors.SafetensorsStore(self._work.result)
    if self._plan.recipe.of_adapters:
      self._write_adapter(store)
      return
    leaves = store.leaves(list(self._specs))
    checkpoint.save_checkpoint(
      self._target, leaves, format=self._format, overwrite=True
    )

  def _write_adapter(self, store):
    """Writes merged changes as an adapter; of products one is held at a time."""
    recipe = self._plan.recipe
    like = [
      one
      for one in self._plan.stores.values()
      if isinstance(one, changes.ChangeStore)
    ]
    self._residuals = written.write_changes(
      self._target, store, like, rank=recipe.adapter.rank, dtype=recipe.dtype,
      overwrite=True,
    )  # fmt: skip

  def _convert_together(self):
    """Writes the result in another format: of its chunks, this process's."""
    group = self._group
    writer = chunked.Writer(self._target, self._format, self._specs)
    if group.index == 0:
      writer.create()
    group.gather()
    store = safetensors.SafetensorsStore(self._work.result)
    for chunk in writer.chunks()[group.index :: group.count]:
      group.check()
      numbers = np.empty(chunk.size, self._specs[chunk.path].dtype)
      store.read_into(chunk.path, chunk.start, numbers)
      writer.write(chunk, numbers)
    group.gather()
    if group.index == 0:
      writer.finish()

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
