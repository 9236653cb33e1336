# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every checkpoint format offers, and how one is written whole or not.

A store opens by reading headers only. Nothing a checkpoint contains is ever
executed: pickles are refused.
"""

import abc
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import ctypes
import os
import pathlib
import shutil
import threading
from typing import Any
import uuid

import jax
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

Shardings = jax.sharding.Sharding | Mapping[typing.Path, jax.sharding.Sharding]


class ParamStore(abc.ABC):
  """Parameters by path, described without being read.

  Attributes:
    tied: `{alias: path}` of parameters that are one array in the model; the
      alias is not stored.
    quantised: the scheme, if the arrays are codes and scales of weights.
    provenance: where this came from: `format`, `path`, `left_out` (what lies
      there too and was not taken, if anything) and what the format itself
      records.
  """

  tied: Mapping[typing.Path, typing.Path] = {}
  quantised: str | None = None
  provenance: Mapping[str, Any] = {}

  @abc.abstractmethod
  def specs(self) -> typing.SpecTree:
    """`{path: LeafSpec}` from headers alone."""

  @abc.abstractmethod
  def leaves(
    self, paths: list[typing.Path]
  ) -> Mapping[typing.Path, np.ndarray | jax.Array]:
    """Reads the named leaves, all of which exist, into host memory."""

  def axes(self) -> dict[typing.Path, tuple[str, ...]]:
    """`{path: logical axes}` of the leaves whose axes are known."""
    found = {path: spec.axes for path, spec in self.specs().items()}
    return {path: axes for path, axes in found.items() if axes is not None}

  def stored_dtype(self, path: typing.Path) -> np.dtype:
    """dtype of a leaf as its model stores it, whatever it is shown as."""
    return self.specs()[path].dtype

  def read(
    self,
    paths: Iterable[typing.Path] | None = None,
    sharding: Shardings | None = None,
    dtype: Any = None,
  ) -> typing.Tree:
    """Reads parameters.

    Args:
      paths: the leaves to read; all by default.
      sharding: where to put them: one sharding or one by path. By default
        they stay in host memory as NumPy arrays.
      dtype: cast floating leaves to this; by default as stored.

    Returns:
      Nested dicts of arrays.

    Raises:
      UserError: a path that the checkpoint does not have.
    """
    specs = self.specs()
    paths = list(specs if paths is None else paths)
    for path in paths:
      if path not in specs:
        raise errors.CheckpointError(
          f'{self.name}: {errors.near(path, specs, "parameter")}'
          if len(specs) < 30
          else f'{self.name} has no parameter {path!r}. `mergejax inspect` '
          'lists what it has.'
        )
    leaves = dict(self.leaves(paths))
    for path, leaf in leaves.items():
      if dtype is not None and jax.numpy.issubdtype(
        leaf.dtype, jax.numpy.floating
      ):
        leaf = leaf.astype(dtype)
      if sharding is not None:
        one = sharding[path] if isinstance(sharding, Mapping) else sharding
        leaf = jax.device_put(leaf, one)
      leaves[path] = leaf
    return tree_lib.unflatten({path: leaves[path] for path in paths})

  def read_into(self, path: typing.Path, start: int, out: np.ndarray) -> None:
    """Reads `out.size` elements of a leaf, from flat position `start` on.

    Formats that lie flat on disk read just those bytes; others read the whole
    leaf once and keep it until this thread asks for another.

    Args:
      path: a leaf of this store.
      start: flat position of the first element.
      out: <dtype of the leaf>[n], contiguous; filled in place.
    """
    kept = self.__dict__.setdefault('_last_leaf', threading.local())
    if getattr(kept, 'path', None) != path:
      kept.leaf = np.asarray(self.leaves([path])[path]).reshape(-1)
      kept.path = path
    out[...] = kept.leaf[start : start + out.size]

  @property
  def reads_pieces(self) -> bool:
    """True if `read_into` reads no more than it is asked for."""
    return False

  def files(self) -> list[pathlib.Path]:
    """The files that the parameters are read from, for their fingerprints."""
    path = pathlib.Path(self.provenance['path'])
    if path.is_dir():
      return sorted(one for one in path.rglob('*') if one.is_file())
    return [path]

  @property
  def name(self) -> str:
    """How messages call this store."""
    return str(self.provenance.get('path', type(self).__name__))


class MemoryStore(ParamStore):
  """A pytree seen as a store.

  Example:
    >>> MemoryStore({'a': {'b': np.zeros((2, 3))}}).specs()['a/b'].shape
    (2, 3)
  """

  def __init__(
    self,
    tree: typing.Tree,
    name: str = 'a tree in memory',
    axes: axes_lib.Rules = (),
  ):
    """Wraps a tree; `axes` names axes of its leaves, see `axes.with_axes`."""
    self._leaves = tree_lib.flatten(tree)
    self._axes = axes
    self.provenance = {'format': 'memory', 'path': name}

  def specs(self) -> typing.SpecTree:
    return axes_lib.with_axes(tree_lib.specs(self._leaves), self._axes)

  def leaves(self, paths):
    return {path: self._leaves[path] for path in paths}


def check_new(path: os.PathLike | str) -> None:
  """Refuses to create what is already there; ask before the work, not after.

  Raises:
    UserError: `path` exists.
  """
  if pathlib.Path(path).exists():
    raise errors.CheckpointError(
      f'{path} already exists. Choose another name, or remove it first.'
    )


def check_zarr(specs: typing.SpecTree) -> None:
  """Refuses dtypes that formats of zarr arrays, written by tensorstore, lack.

  Raises:
    UserError: a parameter has such a dtype.
  """
  import tensorstore  # pylint: disable=import-outside-toplevel

  for path, spec in specs.items():
    try:
      tensorstore.dtype(spec.dtype.name)
    except (TypeError, ValueError) as error:
      raise errors.CheckpointError(
        f'{path} is {spec.dtype.name}, which zarr arrays cannot hold. Cast it '
        'to another dtype, or save as npz.'
      ) from error


@contextlib.contextmanager
def atomic_path(
  path: os.PathLike | str, *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """Gives a temporary path beside `path` that becomes it on success.

  A reader sees the whole result or none of it. On failure, and whatever signal
  comes when, the temporary is removed and what stood at `path` before is
  untouched. Everything is on the disk before it has its name: a power cut
  leaves the old or the new, never an empty file.

  Args:
    path: a file or directory to create.
    overwrite: replace what stands at `path`; an error otherwise.

  Yields:
    The temporary path, whose parent exists.

  Raises:
    UserError: `path` exists, or the disk is full or not writable.
  """
  path = pathlib.Path(path)
  if not overwrite:
    check_new(path)
  # A folder of its own: whatever a library leaves beside its file goes with it.
  folder = path.with_name(f'.{path.name}.tmp-{uuid.uuid4().hex[:8]}')
  try:
    folder.mkdir(parents=True)
    temporary = folder / path.name
    yield temporary
    sync(temporary)
    _take_place(temporary, path)
    sync(path.parent, deep=False)
  except Exception as error:
    if is_write_failure(error):
      raise errors.CheckpointError(
        f'Could not write {path}: {write_failure_reason(error)}. What was '
        'there before is untouched; free some space, or write elsewhere, and '
        'run this again.'
      ) from error
    raise
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def sync(path: os.PathLike | str, *, deep: bool = True) -> None:
  """Waits until a file, or a directory with all that is in it, is on the disk.

  Args:
    path: the file or directory.
    deep: also what the directory contains; without it, only its list of names.
  """
  path = pathlib.Path(path)
  inside = path.rglob('*') if deep and path.is_dir() else ()
  for one in [*inside, path]:
    if one.is_symlink():
      continue
    descriptor = os.open(one, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def _take_place(temporary, path):
  """Puts the new at `path`; what stood there is at `temporary` or gone."""
  if not os.path.lexists(path):
    os.rename(temporary, path)
  elif temporary.is_dir() or (path.is_dir() and not path.is_symlink()):
    _exchange(temporary, path)
  else:
    os.replace(temporary, path)


def _exchange(temporary, path):
  """Swaps two paths in one step: a directory cannot be replaced.

  Where the system or the disk has no such step, in three; a signal between
  them puts the old one back.
  """
  if _renameat2(temporary, path):
    return
  old = path.with_name(f'.{path.name}.old-{uuid.uuid4().hex[:8]}')
  try:
    os.rename(path, old)
    os.rename(temporary, path)
    os.rename(old, temporary)
  except BaseException:
    if old.exists():
      os.rename(old, path if not path.exists() else temporary)
    raise


def _renameat2(first, second) -> bool:
  """True if Linux exchanged two paths."""
  library = ctypes.CDLL(None, use_errno=True)
  if not hasattr(library, 'renameat2'):
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  return not library.renameat2(
    here, os.fsencode(first), here, os.fsencode(second), exchange
  )


def is_write_failure(error: BaseException) -> bool:
  """True if an exception, whatever library wrapped it, is a failed write."""
  if isinstance(error, errors.UserError):
    return False
  text = str(error)
  return isinstance(error, OSError) or any(
    sign in text
    for sign in ('No space left', 'File too large', 'quota', 'Read-only file')
  )


def write_failure_reason(error: BaseException) -> str:
  """The operating system's word for a failed write."""
  for sign in ('No space left on device', 'File too large'):
    if sign in str(error):
      return sign
  return getattr(error, 'strerror', None) or str(error).splitlines()[0]
