# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which TFDS sets are on this machine, asked without a network."""

from collections.abc import Iterable, Sequence
import logging

import seqio
import tensorflow_datasets as tfds

from mergejax.core import errors


def state(name: str, data_dir: str | None = None) -> str:
  """`'ready'`, `'to build'` (known, not on this machine), or `'unknown'`.

  Args:
    name: `set`, `set/config` or `set/config:version`.
    data_dir: TFDS's own by default (`TFDS_DATA_DIR`, `~/tensorflow_datasets`).
  """
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)  # TFDS warns of folders without data
  try:
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    return 'ready' if builder.is_prepared() else 'to build'
  except tfds.core.DatasetNotFoundError:
    return 'unknown'
  except (ValueError, AssertionError):  # no such configuration or version
    return 'unknown'
  finally:
    logger.setLevel(level)


def missing(tasks: Iterable[seqio.Task]) -> dict[str, tuple[str, str]]:
  """`{task: (name in TFDS, state)}` of tasks whose set is not ready.

  Tasks over other sources are not looked at.
  """
  found = {}
  for task in tasks:
    if isinstance(task.source, seqio.TfdsDataSource):
      loader = task.source.tfds_dataset
      for name, folder in sorted(_places(loader, task.source.splits)):
        told = state(name, folder or None)
        if told != 'ready':
          found[task.name] = (name, told)
  return found


def _places(loader, splits):
  if loader.tfds_splits is None:
    return {(loader.name, loader.data_dir or '')}
  params = [loader.get_split_params(split) for split in splits]
  return {(name, folder or '') for name, folder in params}


def check(tasks: Sequence[seqio.Task]) -> None:
  """Raises if the set of a task is not ready.

  Raises:
    DataError: lists them all, and says how each is had.
  """
  absent = missing(tasks)
  if not absent:
    return
  lines = [f'{task}: {name} ({told})' for task, (name, told) in absent.items()]
  build = sorted({n for n, told in absent.values() if told == 'to build'})
  unknown = sorted({n for n, told in absent.values() if told == 'unknown'})
  message = (
    f'Of {len(tasks)} tasks, {len(absent)} have no data here:\n'
    f'{errors.listed(lines, limit=len(lines))}\n'
  )
  if build:
    message += (
      'On a machine with a network, build each once, for example '
      f'`tfds build {build[0].split(":")[0]}`, with TFDS_DATA_DIR where all '
      'machines read it. '
    )
  if unknown:
    message += (
      f'This TFDS has no {errors.some(unknown)}: see to the name and version, or '
      'install another tensorflow-datasets. '
    )
  raise errors.DataError(f'{message}Or leave these tasks out.')
