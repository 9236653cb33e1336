# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""safetensors: one file, or a Hugging Face directory, sharded or not."""

import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from mergejax import errors
from mergejax import typing
from mergejax.store import base

_INDEX = 'model.safetensors.index.json'
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
    self._specs: typing.SpecTree = {}
    self.provenance = {'format': 'safetensors', 'path': str(path)}
    index = path / _INDEX
    if index.is_file():
      files = self._indexed(index)
    else:
      files = files_of(path)
    for file in files:
      for name, spec in _header(file).items():
        if name in self._specs:
          raise errors.UserError(
            f'{file} and {self._file_of[name]} both hold {name!r}: remove '
            f'the one that does not belong to the model in {path}.'
          )
        self._specs[name], self._file_of[name] = spec, file
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

  def _read(self, paths):
    leaves = {}
    for file in sorted({self._file_of[path] for path in paths}):
      with safetensors.safe_open(file, 'numpy') as reader:
        for path in paths:
          if self._file_of[path] == file:
            leaves[path] = reader.get_tensor(path)
    return leaves


def _header(file: pathlib.Path) -> typing.SpecTree:
  """Specs of one file; every kind of damage becomes one message."""
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
      specs = {}
      for name in reader.keys():
        part = reader.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in _DTYPES:
          raise errors.UserError(
            f'{file}: tensor {name!r} has dtype {dtype}, which is not '
            f'supported. Known: {", ".join(_DTYPES)}.'
          )
        specs[name] = typing.LeafSpec(
          tuple(part.get_shape()), np.dtype(_DTYPES[dtype])
        )
      return specs
  except safetensors.SafetensorError as error:
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
    {name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()},
    path,
    metadata={'format': 'pt'},
  )


def write_sharded(path: pathlib.Path, leaves, max_shard_bytes: int) -> None:
  """Writes a Hugging Face directory: shards and their index.

  Args:
    path: a directory to create.
    leaves: `{path: array}`, kept in this order.
    max_shard_bytes: a shard is closed before it would grow past this; a single
      larger array gets a shard of its own.
  """
  shards, size = [{}], 0
  for name, leaf in leaves.items():
    if shards[-1] and size + leaf.nbytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = leaf
    size += leaf.nbytes
  path.mkdir()
  if len(shards) == 1:
    write(path / 'model.safetensors', shards[0])
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f'model-{i:05d}-of-{len(shards):05d}.safetensors'
    write(path / file, shard)
    weight_map.update(dict.fromkeys(shard, file))
  total = sum(leaf.nbytes for leaf in leaves.values())
  index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
  (path / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
