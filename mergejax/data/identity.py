# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a task or mixture is made of, so that a run can tell its own data."""

from collections.abc import Mapping
import functools
import hashlib
import pathlib
from typing import Any

import numpy as np
import seqio

from mergejax.core import checksums
from mergejax.data import sources

# Examples that are made to see what templates and vocabulary do to a file.
_EXAMPLES = 4


def describe(
  mixture_or_task: str,
  split: str,
  lengths: Mapping[str, int],
  *,
  cached: bool = False,
) -> dict[str, Any]:
  """The content of a split of a task or mixture, as plain data.

  Names of tasks do not count, and neither does where files lie.

  Args:
    mixture_or_task: a name registered in seqio.
    split: the split.
    lengths: tokens per feature.
    cached: read what seqio's cache holds of it, and not its source.

  Returns:
    For a task `files` (name and sha256 of each), and what makes examples of
    them: of a task of this package `made by` (a digest of templates, vocabulary
    and options, and the steps), of any other `first examples` (sha256 of some);
    for a mixture that of every task, with its rate.
  """
  found = seqio.get_mixture_or_task(mixture_or_task)
  sizes = tuple(sorted(lengths.items()))
  if not isinstance(found, seqio.Mixture):
    return _task(found, split, sizes, cached)
  return {
    f'part {i}': {
      'rate': float(found.get_rate(task)),
      **_task(task, split, sizes, cached),
    }
    for i, task in enumerate(found.tasks)
  }


@functools.lru_cache(maxsize=256)  # tasks hash by what they are, not by name
def _task(task, split, sizes, cached):
  if cached:
    folder = pathlib.Path(task.cache_dir)
    files = sorted(folder.glob(f'{split}.tfrecord-*'))
  else:
    files = [pathlib.Path(str(each)) for each in task.source.list_shards(split)]
  return {
    'files': ', '.join(
      f'{file.name} {checksums.SUMS.of(file)[:16]}'
      if file.is_file()
      else file.name
      for file in files
    ),
    **_making(task, split, sizes, cached),
  }


def _making(task, split, sizes, cached):
  """What tells how examples are made of the files."""
  if isinstance(task.source, sources.RowSource) and not cached:
    # Told by the source: a pipeline need not be opened to see some.
    steps = [getattr(step, 'func', step) for step in task.preprocessors]
    names = [getattr(step, '__qualname__', repr(step)) for step in steps]
    return {'made by': f'{task.source.making[:16]} {" ".join(names)}'}
  return {'first examples': _examples(task, split, sizes, cached)}


def _examples(task, split, sizes, cached):
  dataset = task.get_dataset(
    dict(sizes), split=split, shuffle=False, seed=0, try_in_mem_cache=False,
    use_cached=cached,
  )  # fmt: skip
  digest = hashlib.sha256()
  for example in dataset.take(_EXAMPLES).as_numpy_iterator():
    for name in sorted(example):
      value = np.asarray(example[name])
      content = (
        value.tobytes() if value.dtype != object else repr(value).encode()
      )
      digest.update(
        f'{name} {value.dtype.str} {value.shape}'.encode() + content
      )
  return digest.hexdigest()[:16]
