# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""NumPy archives: for small trees and for exchange with plain NumPy."""

from collections.abc import Mapping
import pathlib
import re
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from mergejax.checkpoints import base
from mergejax.core import errors
from mergejax.core import typing

# .npy cannot name the dtypes of ml_dtypes (bfloat16, float8, int4); such a leaf
# is stored as its bits, and the name of its dtype after the leaf's.
_DTYPE_SUFFIX = re.compile(r'(?P<name>.*)\|(?P<dtype>\w+)', re.DOTALL)


class NpzStore(base.ParamStore):
  """Reads a `.npz`; object arrays (pickles) are refused."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.provenance = {'format': 'npz', 'path': str(path)}
    self._member: dict[typing.Path, str] = {}
    self._specs: typing.SpecTree = {}
    try:
      with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
          with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = (
              np.lib.format.read_array_header_1_0
              if version == (1, 0)
              else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(stream)
          self._add(member.removesuffix('.npy'), shape, dtype)
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
      raise errors.CheckpointError(
        f'{path} is not a readable NumPy archive ({error}).'
      ) from error

  def _add(self, member, shape, dtype):
    if dtype.hasobject:
      raise errors.CheckpointError(
        f'{self._path}: {member!r} holds Python objects (a pickle), which '
        'are never loaded. Save plain arrays with numpy.savez.'
      )
    name = member
    match = _DTYPE_SUFFIX.fullmatch(member)
    kind = getattr(ml_dtypes, match['dtype'], None) if match else None
    bits = isinstance(kind, type) and np.dtype(f'u{np.dtype(kind).itemsize}')
    if match is not None and bits == dtype:
      name, dtype = match['name'], np.dtype(kind)
    elif dtype.kind == 'V' and dtype.names is None and dtype.itemsize == 2:
      # numpy.savez of a bfloat16 array; no other dtype has two nameless bytes.
      dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.kind == 'V':
      raise errors.CheckpointError(
        f'{self._path}: {member!r} is {dtype}: bytes of which NumPy does not '
        'say what they mean (float8 and int4 are saved so). Save it with '
        'mj.save_checkpoint, or as one plain number each.'
      )
    self._member[name] = member
    self._specs[name] = typing.LeafSpec(tuple(shape), dtype)

  def specs(self) -> typing.SpecTree:
    return self._specs

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    with np.load(self._path, allow_pickle=False) as archive:
      return {
        path: archive[self._member[path]].view(self._specs[path].dtype)
        for path in paths
      }


def write(path: pathlib.Path, leaves) -> None:
  """Writes `{path: array}` as an uncompressed archive."""
  members = {}
  for name, leaf in leaves.items():
    if leaf.dtype.isbuiltin == 2:  # registered by another package
      name = f'{name}|{leaf.dtype.name}'
      leaf = leaf.view(f'u{leaf.dtype.itemsize}')
    members[name] = leaf
  with open(path, 'wb') as stream:  # np.savez would append '.npz' to a name
    np.savez(stream, **members)
