# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that several processes write, chunk by chunk.

Every array lies in zarr chunks of some of its rows, one file each. The first
process creates empty arrays; whoever has the rows of a chunk writes it; at last
the first one says what the arrays are. Which process wrote what leaves no trace.
"""

from collections.abc import Sequence
import functools
import math
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import orbax
from mergejax.checkpoints import t5x
from mergejax.checkpoints import t5x_writing
from mergejax.core import typing

FORMATS = ('orbax', 't5x')
# Bytes of a chunk, unless one row has more.
CHUNK = 1 << 26


class Chunk(NamedTuple):
  """Rows of an array: `size` numbers from flat position `start` on."""

  path: typing.Path
  first: int
  stop: int
  start: int
  size: int


class Writer:
  """A checkpoint that is written chunk by chunk, as one process sees it."""

  def __init__(self, path: pathlib.Path, format: str, specs: typing.SpecTree):  # pylint: disable=redefined-builtin
    """Touches no file.

    Args:
      path: the directory.
      format: 'orbax' (without OCDBT, one folder an array) or 't5x'.
      specs: the arrays.
    """
    self._path, self._format, self._specs = path.absolute(), format, specs
    self._array = functools.lru_cache(maxsize=8)(self._opened)

  def create(self) -> None:
    """Makes empty arrays in place of what was there: no checkpoint yet.

    Raises:
      UserError: a dtype that zarr arrays cannot hold.
    """
    base.check_zarr(self._specs)
    shutil.rmtree(self._path, ignore_errors=True)
    self._path.mkdir()
    for name in self._specs:
      self._opened(name, create=True)

  def finish(self) -> None:
    """Makes it a checkpoint, once all chunks are written."""
    if self._format == 'orbax':
      orbax.write_tree(self._path, list(self._specs))
      return
    entries = {
      name: t5x_writing.entry(
        self._folder(name), spec.dtype, self._metadata(name)
      )
      for name, spec in self._specs.items()
    }
    t5x_writing.write_tree(self._path, entries)

  def chunks(self) -> list[Chunk]:
    """All of them, in the order of the arrays."""
    found = []
    for name, spec in self._specs.items():
      rows = self._rows(spec)
      count = spec.shape[0] if spec.shape else 1
      width = spec.size // max(1, count)
      for first in range(0, count if spec.size else 0, rows):
        stop = min(count, first + rows)
        at, size = first * width, (stop - first) * width
        found.append(Chunk(name, first, stop, at, size))
    return found

  def write(self, chunk: Chunk, numbers: np.ndarray) -> None:
    """Writes a chunk.

    Args:
      chunk: of `chunks`.
      numbers: <dtype>[size].
    """
    spec = self._specs[chunk.path]
    array = self._array(chunk.path)
    if spec.shape:
      array = array[chunk.first : chunk.stop]
      numbers = numbers.reshape(-1, *spec.shape[1:])
    else:
      numbers = numbers.reshape(())
    array.write(numbers).result()

  def _rows(self, spec):
    width = math.prod(spec.shape[1:]) * spec.dtype.itemsize
    return max(1, min((spec.shape or (1,))[0], CHUNK // max(1, width)))

  def _metadata(self, name) -> dict[str, Any]:
    spec = self._specs[name]
    chunks: Sequence[int] = spec.shape and (
      self._rows(spec), *(max(1, n) for n in spec.shape[1:])
    )  # fmt: skip
    found = t5x.zarr_metadata(spec.shape, spec.dtype, chunks)
    if self._format == 'orbax':
      found |= {'compressor': {'id': 'zstd', 'level': 1}}
    return found

  def _folder(self, name):
    prefix = 'target.' if self._format == 't5x' else ''
    return f'{prefix}{name.replace("/", ".")}/'

  def _opened(self, name, create=False):
    import tensorstore  # pylint: disable=import-outside-toplevel

    where = f'{self._path}/{self._folder(name)}'
    spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': where}}
    if create:
      spec['metadata'] = self._metadata(name)
    return tensorstore.open(spec, create=create, open=not create).result()
