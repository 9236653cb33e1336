# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""NumPy archives: for small trees and for exchange with plain NumPy."""

import pathlib
import zipfile

import ml_dtypes
import numpy as np

from mergejax import errors
from mergejax import typing
from mergejax.store import base

# .npy cannot name bfloat16; such a leaf is stored as its 16 bits.
_BFLOAT16_SUFFIX = '|bfloat16'


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
      raise errors.UserError(
        f'{path} is not a readable NumPy archive ({error}).'
      ) from error

  def _add(self, member, shape, dtype):
    if dtype.hasobject:
      raise errors.UserError(
        f'{self._path}: {member!r} holds Python objects (a pickle), which '
        'are never loaded. Save plain arrays with numpy.savez.'
      )
    name = member.removesuffix(_BFLOAT16_SUFFIX)
    if name != member:
      dtype = np.dtype(ml_dtypes.bfloat16)
    self._member[name] = member
    self._specs[name] = typing.LeafSpec(tuple(shape), dtype)

  def specs(self) -> typing.SpecTree:
    return self._specs

  def leaves(self, paths):
    with np.load(self._path, allow_pickle=False) as archive:
      return {
        path: archive[self._member[path]].view(self._specs[path].dtype)
        for path in paths
      }


def write(path: pathlib.Path, leaves) -> None:
  """Writes `{path: array}` as an uncompressed archive."""
  members = {}
  for name, leaf in leaves.items():
    if leaf.dtype == ml_dtypes.bfloat16:
      name, leaf = name + _BFLOAT16_SUFFIX, leaf.view(np.uint16)
    members[name] = leaf
  with open(path, 'wb') as stream:  # np.savez would append '.npz' to a name
    np.savez(stream, **members)
