# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""safetensors: one file, or a Hugging Face directory, sharded or not."""

from collections.abc import Mapping
import json
import os
import pathlib
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mergejax import errors
from mergejax import typing
from mergejax.store import base

INDEX = 'model.safetensors.index.json'
_DTYPES = {
    'BOOL': np.bool_, 'U8': np.uint8, 'I8': np.int8, 'I16': np.int16,
    'U16': np.uint16, 'I32': np.int32, 'U32': np.uint32, 'I64': np.int64,
    'U64': np.uint64, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
    'F32': np.float32, 'F64': np.float64,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2,
}  # fmt: skip


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files meant by a file or directory; none if it has none."""
  if path.is_file():
    return [path] if path.suffix == '.safetensors' else []
  return sorted(path.glob('*.safetensors')) if path.is_dir() else []


class SafetensorsStore(base.ParamStore):
  """Reads one safetensors file or all files of a Hugging Face directory."""

  def __init__(self, path: pathlib.Path):
    self._file_of: dict[typing.Path, pathlib.Path] = {}
    self._offset: dict[typing.Path, int] = {}
    self._specs: typing.SpecTree = {}
    self._open_files: dict[pathlib.Path, int] = {}
    self.provenance = {'format': 'safetensors', 'path': str(path)}
    index = path / INDEX
    if index.is_file():
      files = self._indexed(index)
    else:
      files = files_of(path)
    for file in files:
      for name, (spec, offset) in _header(file).items():
        if name in self._specs:
          raise errors.UserError(
            f'{file} and {self._file_of[name]} both hold {name!r}: remove '
            f'the one that does not belong to the model in {path}.'
          )
        self._specs[name], self._file_of[name] = spec, file
        self._offset[name] = offset
    if index.is_file():
      self._check_index(index)

  def _indexed(self, index):
    try:
      self._weight_map = json.loads(index.read_text())['weight_map']
      files = sorted(
        {index.parent / name for name in self._weight_map.values()}
      )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise errors.UserError(
        f'{index} is not a safetensors index: it should be JSON with a '
        "'weight_map' of tensor names to file names."
      ) from error
    for file in files:
      if file.parent.resolve() != index.parent.resolve():
        raise errors.UserError(
          f'{index} names a file outside its folder: {file}'
        )
      if not file.is_file():
        raise errors.UserError(
          f'{index} names {file.name}, which is missing: the download or '
          'copy of this model is incomplete.'
        )
    return files

  def _check_index(self, index):
    for name, file in self._weight_map.items():
      if self._file_of.get(name) != index.parent / file:
        raise errors.UserError(
          f'{index} says {name!r} is in {file}, but it is not there. The '
          'index and the files belong to different models.'
        )

  def specs(self) -> typing.SpecTree:
    return self._specs

  def leaves(self, paths):
    leaves = {}
    for path in sorted(
      paths, key=lambda p: (self._file_of[p], self._offset[p])
    ):
      spec = self._specs[path]
      # Not by the library: its reader for NumPy does not know float8.
      flat = np.empty(spec.size, spec.dtype)
      self.read_into(path, 0, flat)
      leaves[path] = flat.reshape(spec.shape)
    return leaves

  @property
  def reads_pieces(self):
    return True

  def files(self):
    return sorted(set(self._file_of.values()))

  def read_into(self, path, start, out):
    file = self._file_of[path]
    descriptor = self._open_files.get(file)
    if descriptor is None:
      descriptor = os.open(file, os.O_RDONLY)
      # Two threads may both have opened it; the later one is kept.
      spare = self._open_files.setdefault(file, descriptor)
      if spare != descriptor:
        os.close(descriptor)
        descriptor = spare
    view = memoryview(out.view(np.uint8))
    position = self._offset[path] + start * out.itemsize
    while view:
      count = os.preadv(descriptor, [view], position)
      if count == 0:
        raise errors.UserError(
          f'{file} became shorter while it was read: {path!r} is cut off.'
        )
      view, position = view[count:], position + count

  def __del__(self, close=os.close):
    # `os` itself may be gone when the interpreter ends.
    for descriptor in self.__dict__.get('_open_files', {}).values():
      close(descriptor)


def _header(
  file: pathlib.Path,
) -> dict[typing.Path, tuple[typing.LeafSpec, int]]:
  """`{name: (spec, offset in the file)}`; any damage becomes one message."""
  size = file.stat().st_size
  with open(file, 'rb') as stream:
    start = stream.read(8)
  if len(start) < 8 or struct.unpack('<Q', start)[0] + 8 > size:
    claimed = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
    raise errors.UserError(
      f'{file} is not a whole safetensors file: its header claims '
      f'{claimed} bytes but the file has {size}. It was cut short or is of '
      'another format; download or save it again.'
    )
  try:
    with safetensors.safe_open(file, 'numpy') as reader:
      found = {}
      with open(file, 'rb') as stream:
        length = struct.unpack('<Q', stream.read(8))[0]
        # The library has checked the header: offsets fit shapes, are within
        # the file, and do not overlap.
        header = json.loads(stream.read(length))
      for name in reader.keys():
        part = reader.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in _DTYPES:
          raise errors.UserError(
            f'{file}: tensor {name!r} has dtype {dtype}, which is not '
            f'supported. Known: {", ".join(_DTYPES)}.'
          )
        spec = typing.LeafSpec(
          tuple(part.get_shape()), np.dtype(_DTYPES[dtype])
        )
        found[name] = spec, 8 + length + header[name]['data_offsets'][0]
      # In the order of the file, so that reading it goes forward.
      return dict(sorted(found.items(), key=lambda item: item[1][1]))
  except (safetensors.SafetensorError, ValueError, OSError) as error:
    raise errors.UserError(
      f'{file} has a damaged safetensors header ({error}). Download or save '
      'it again.'
    ) from error


def write(path: pathlib.Path, leaves) -> None:
  """Writes `{path: array}` as one safetensors file.

  The metadata `format: pt` is what Hugging Face loaders ask for; the numbers
  are the same for every framework.
  """
  safetensors.numpy.save_file(
    {name: np.require(leaf, requirements='C') for name, leaf in leaves.items()},
    path,
    metadata={'format': 'pt'},
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
  specs: typing.SpecTree, max_shard_bytes: int, stem: str = 'model'
) -> list[Shard]:
  """Decides what lies where in a Hugging Face directory, before any number.

  Args:
    specs: the arrays, kept in this order.
    max_shard_bytes: a shard is closed before it would grow past this; a single
      larger array gets a shard of its own.
    stem: first part of the file names.

  Returns:
    One `Shard` a file.
  """
  groups, size = [{}], 0
  for name, spec in specs.items():
    if groups[-1] and size + spec.nbytes > max_shard_bytes:
      groups.append({})
      size = 0
    groups[-1][name] = spec
    size += spec.nbytes
  names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
  shards = []
  for i, group in enumerate(groups, 1):
    # `format: pt` is what Hugging Face loaders ask for.
    header, at = {'__metadata__': {'format': 'pt'}}, 0
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


def write_sharded(path: pathlib.Path, leaves, max_shard_bytes: int) -> None:
  """Writes a Hugging Face directory: shards and their index; see `lay_out`."""
  specs = {
    name: typing.LeafSpec(leaf.shape, leaf.dtype)
    for name, leaf in leaves.items()
  }
  shards = lay_out(specs, max_shard_bytes)
  path.mkdir()
  for shard in shards:
    write(path / shard.file, {name: leaves[name] for name in shard.offsets})
  index = index_of(shards, specs)
  if index is not None:
    (path / INDEX).write_text(index)
