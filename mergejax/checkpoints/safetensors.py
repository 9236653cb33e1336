# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""safetensors: one file, or a Hugging Face directory, sharded or not."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import re
import struct
import sys
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from mergejax.checkpoints import axes_file
from mergejax.checkpoints import base
from mergejax.checkpoints import shards as shards_lib
from mergejax.core import errors
from mergejax.core import typing

INDEX = shards_lib.INDEX
_DTYPES = {
    'BOOL': np.bool_, 'U8': np.uint8, 'I8': np.int8, 'I16': np.int16,
    'U16': np.uint16, 'I32': np.int32, 'U32': np.uint32, 'I64': np.int64,
    'U64': np.uint64, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F32': np.float32, 'F64': np.float64,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
    'F8_E8M0': ml_dtypes.float8_e8m0fnu,
    'F8_E4M3FNUZ': ml_dtypes.float8_e4m3fnuz,
    'F8_E5M2FNUZ': ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


class SafetensorsStore(base.ParamStore):
  """Reads one safetensors file or all files of a Hugging Face directory."""

  def __init__(self, path: pathlib.Path):
    self._file_of: dict[typing.Path, pathlib.Path] = {}
    self._offset: dict[typing.Path, int] = {}
    self._specs: typing.SpecTree = {}
    self._open_files: dict[pathlib.Path, int] = {}
    self.provenance = {'format': 'safetensors', 'path': str(path)}
    chosen = shards_lib.choose(path)
    axes: dict[typing.Path, tuple[str, ...]] = {}
    if chosen.left_out:
      self.provenance['left_out'] = chosen.left_out
    for file in chosen.files:
      header, metadata = _header(file)
      if axes_file.KEY in metadata:
        axes |= axes_file.parse(metadata[axes_file.KEY], f'axes of {file}')
      for name, (spec, offset) in header.items():
        if name in self._specs:
          raise errors.CheckpointError(
            f'{file} and {self._file_of[name]} both hold {name!r}: remove '
            f'the one that does not belong to the model in {path}.'
          )
        self._specs[name], self._file_of[name] = spec, file
        self._offset[name] = offset
    self._check_index(chosen)
    axes_file.attach(self, axes)

  def _check_index(self, chosen):
    for name, file in chosen.weight_map.items():
      if self._file_of.get(name) != chosen.index.parent / file:
        raise errors.CheckpointError(
          f'{chosen.index} says {name!r} is in {file}, but it is not there. '
          'The index and the files belong to different models.'
        )

  def specs(self) -> typing.SpecTree:
    return self._specs

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    leaves = {}
    # In the order of the files, so that reading goes forward.
    for path in sorted(
      paths, key=lambda p: (self._file_of[p], self._offset[p])
    ):
      spec = self._specs[path]
      # Not by the library: its reader for NumPy does not know float8.
      flat = np.empty(spec.size, spec.dtype)
      self.read_into(path, 0, flat)
      leaves[path] = flat.reshape(spec.shape)
    return leaves

  def read_slices(
    self, path: typing.Path, axis: int, first: int, stop: int
  ) -> np.ndarray:
    spec = self._specs[path]
    before, count = math.prod(spec.shape[:axis]), spec.shape[axis]
    width = math.prod(spec.shape[axis + 1 :])
    rows = np.empty((before, (stop - first) * width), spec.dtype)
    for number, row in enumerate(rows):
      self.read_into(path, (number * count + first) * width, row)
    return rows.reshape(
      *spec.shape[:axis], stop - first, *spec.shape[axis + 1 :]
    )

  def has_slices(self, path: typing.Path, axis: int) -> bool:
    return True

  def window_bytes(self, path: typing.Path) -> int:
    return 0

  def files(self) -> list[pathlib.Path]:
    return sorted(set(self._file_of.values()))

  def read_into(self, path: typing.Path, start: int, out: np.ndarray) -> None:
    file = self._file_of[path]
    descriptor = self._open_files.get(file)
    if descriptor is None:
      descriptor = os.open(file, os.O_RDONLY)
      # Two threads may both have opened it; the later one is kept.
      spare = self._open_files.setdefault(file, descriptor)
      if spare != descriptor:
        os.close(descriptor)
        descriptor = spare
    view = memoryview(out.view(np.uint8).data)
    position = self._offset[path] + start * out.itemsize
    while view:
      count = os.preadv(descriptor, [view], position)
      if count == 0:
        raise errors.CheckpointError(
          f'{file} became shorter while it was read: {path!r} is cut off.'
        )
      view, position = view[count:], position + count

  def __del__(self, close=os.close):
    # `os` itself may be gone when the interpreter ends.
    for descriptor in self.__dict__.get('_open_files', {}).values():
      close(descriptor)


def _header(
  file: pathlib.Path,
) -> tuple[dict[typing.Path, tuple[typing.LeafSpec, int]], dict[str, str]]:
  """`({name: (spec, offset in the file)}, metadata)`.

  Any damage becomes one message.
  """
  size = file.stat().st_size
  with open(file, 'rb') as stream:
    start = stream.read(8)
  length = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
  if len(start) < 8 or length + 8 > size:
    raise errors.CheckpointError(
      f'{file} is not a whole safetensors file: its header claims '
      f'{length} bytes but the file has {size}. It was cut short or is of '
      'another format; download or save it again.'
    )
  try:
    with safetensors.safe_open(file, 'numpy'):
      # The library has checked the header: offsets fit shapes, are within the
      # file, and do not overlap.
      with open(file, 'rb') as stream:
        stream.seek(8)
        header = json.loads(stream.read(length))
  except (safetensors.SafetensorError, ValueError, OSError) as error:
    unknown = re.search(r'unknown variant `([^`]+)`', str(error))
    if unknown:
      raise errors.CheckpointError(
        f'{file}: {_unsupported(unknown[1])}'
      ) from error
    raise errors.CheckpointError(
      f'{file} has a damaged safetensors header ({error}). Download or save '
      'it again.'
    ) from error
  found = {}
  metadata = header.pop('__metadata__', None) or {}
  for name, entry in header.items():
    if entry['dtype'] not in _DTYPES:
      raise errors.CheckpointError(
        f'{file}: tensor {name!r}: {_unsupported(entry["dtype"])}'
      )
    spec = typing.LeafSpec(
      tuple(entry['shape']), np.dtype(_DTYPES[entry['dtype']])
    )
    found[name] = spec, 8 + length + entry['data_offsets'][0]
  # In the order of the file, so that reading it goes forward.
  ordered = dict(sorted(found.items(), key=lambda item: item[1][1]))
  return ordered, metadata


def _unsupported(dtype):
  return (
    f'dtype {dtype} is not supported. Known: {", ".join(_DTYPES)}. Save the '
    'model with one of these, or without this array if it can do without.'
  )


class Shard(NamedTuple):
  """A safetensors file that is yet to be written.

  Attributes:
    file: its name.
    header: its first bytes.
    offsets: where each array begins in the file.
    nbytes: its size.
  """

  file: str
  header: bytes
  offsets: Mapping[typing.Path, int]
  nbytes: int


def lay_out(
  specs: typing.SpecTree,
  max_shard_bytes: int,
  stem: str = 'model',
  *,
  with_axes: bool = False,
) -> list[Shard]:
  """Decides what lies where in a Hugging Face directory, before any number.

  Args:
    specs: the arrays, kept in this order.
    max_shard_bytes: a shard is closed before it would grow past this; a single
      larger array gets a shard of its own.
    stem: first part of the file names.
    with_axes: a file's metadata say the logical axes of its arrays, which
      directories have in a file of their own.

  Returns:
    One `Shard` a file.

  Raises:
    UserError: a dtype that the format does not have.
  """
  names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
  for name, spec in specs.items():
    if spec.dtype not in names:
      raise errors.CheckpointError(
        f'{name} is {spec.dtype.name}, which safetensors cannot hold. Known: '
        f'{", ".join(dtype.name for dtype in names)}. Cast it, or save as npz.'
      )
  groups, size = [{}], 0
  for name, spec in specs.items():
    if groups[-1] and size + spec.nbytes > max_shard_bytes:
      groups.append({})
      size = 0
    groups[-1][name] = spec
    size += spec.nbytes
  shards = []
  for i, group in enumerate(groups, 1):
    # `format: pt` is what Hugging Face loaders ask for.
    header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    at = 0
    axes = {n: spec.axes for n, spec in group.items() if spec.axes is not None}
    if with_axes and axes:
      header['__metadata__'][axes_file.KEY] = axes_file.text(axes)
    for name, spec in group.items():
      header[name] = {
        'dtype': names[spec.dtype],
        'shape': list(spec.shape),
        'data_offsets': [at, at + spec.nbytes],
      }
      at += spec.nbytes
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    start = 8 + len(text)
    file = f'{stem}-{i:05d}-of-{len(groups):05d}.safetensors'
    if len(groups) == 1:
      file = f'{stem}.safetensors'
    shards.append(
      Shard(
        file,
        struct.pack('<Q', len(text)) + text,
        {n: start + header[n]['data_offsets'][0] for n in group},
        start + at,
      )
    )
  return shards


def index_of(shards: list[Shard], specs: typing.SpecTree) -> str | None:
  """The text of the index of several shards; None for a single one."""
  if len(shards) == 1:
    return None
  total = sum(spec.nbytes for spec in specs.values())
  weight_map = {name: s.file for s in shards for name in s.offsets}
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  return json.dumps(index, indent=2) + '\n'


def write(
  path: pathlib.Path,
  leaves: Mapping[typing.Path, np.ndarray],
  axes: Mapping[typing.Path, tuple[str, ...]] | None = None,
) -> None:
  """Writes `{path: array}` as one safetensors file.

  Args:
    path: the file to create.
    leaves: the arrays.
    axes: their logical axes, where they are known.

  Raises:
    UserError: a dtype that the format does not have.
  """
  axes = axes or {}
  specs = {
    name: typing.LeafSpec(a.shape, a.dtype, axes.get(name))
    for name, a in leaves.items()
  }
  (shard,) = lay_out(specs, sys.maxsize, with_axes=True)
  _write_shard(path, shard, leaves)


def _write_shard(path, shard, leaves):
  with open(path, 'wb') as stream:
    stream.write(shard.header)
    for name in shard.offsets:
      flat = np.require(leaves[name], requirements='C').reshape(-1)
      stream.write(flat.view(np.uint8))


def write_sharded(path: pathlib.Path, leaves, max_shard_bytes: int) -> None:
  """Writes a Hugging Face directory: shards and their index; see `lay_out`."""
  specs = {
    name: typing.LeafSpec(a.shape, a.dtype) for name, a in leaves.items()
  }
  shards = lay_out(specs, max_shard_bytes)
  path.mkdir()
  for shard in shards:
    _write_shard(path / shard.file, shard, leaves)
  index = index_of(shards, specs)
  if index is not None:
    (path / INDEX).write_text(index)
