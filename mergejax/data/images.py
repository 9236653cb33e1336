# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Images with labels from local NumPy archives."""

import os
import pathlib
import zipfile

import numpy as np

from mergejax.core import errors
from mergejax.data import tasks


def path(folder: os.PathLike | str, split: str) -> pathlib.Path:
  """The file of a split of images.

  Raises:
    UserError: it is missing.
  """
  found = pathlib.Path(tasks.locate(folder)) / f'{split}.npz'
  if not found.is_file():
    raise errors.DataError(f'There is no {found}.')
  return found


def load(folder: os.PathLike | str, split: str) -> dict[str, np.ndarray]:
  """Reads `FOLDER/SPLIT.npz` with the arrays `images` and `labels`.

  Args:
    folder: a path, or a path below `MERGEJAX_DATA`.
    split: 'train', 'validation' or 'test'.

  Returns:
    `images <uint8>[examples, height, width(, channels)]`, `labels
    <int32>[examples]`.

  Raises:
    UserError: the file is missing or has no such arrays.
  """
  file = path(folder, split)
  try:
    with np.load(file, allow_pickle=False) as archive:
      images, labels = archive['images'], archive['labels']
  except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
    raise errors.DataError(
      f'{file} does not hold the arrays `images` and `labels`: {error}.'
    ) from error
  if len(images) != len(labels) or images.ndim not in (3, 4):
    raise errors.DataError(
      f'{file}: images {list(images.shape)} and labels {list(labels.shape)} do '
      'not fit.'
    )
  return {'images': images, 'labels': labels.astype(np.int32)}


def batches(
  arrays: dict[str, np.ndarray], batch_size: int, limit: int | None = None
) -> list[dict[str, np.ndarray]]:
  """Arrays in order, in batches of equal shape; `weights` is 0 on filling."""
  count = len(arrays['labels'])
  rows = np.arange(count)
  if limit is not None and limit < count:
    rows = np.sort(np.random.default_rng(0).permutation(count)[:limit])
  result = []
  for start in range(0, len(rows), batch_size):
    some = rows[start : start + batch_size]
    missing = batch_size - len(some)
    batch = {
      name: np.pad(leaf[some], [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
      for name, leaf in arrays.items()
    }
    batch['weights'] = (np.arange(batch_size) < len(some)).astype(np.float32)
    result.append(batch)
  return result
