# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every checkpoint format offers.

A store opens by reading headers only. Nothing a checkpoint contains is ever
executed: pickles are refused.
"""

import abc
from collections.abc import Iterable, Mapping
import os
import pathlib
import threading
from typing import Any

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
    kept = vars(self).setdefault('_last_leaf', threading.local())
    if getattr(kept, 'path', None) != path:
      kept.leaf = np.asarray(self.leaves([path])[path]).reshape(-1)
      kept.path = path
    out[...] = kept.leaf[start : start + out.size]

  def window_bytes(self, path: typing.Path) -> int:
    """Bytes of a leaf that `read_into` reads at once and keeps, at the least.

    0 if it reads no more than it is asked for, all of a leaf that lies in one
    block.
    """
    return self.specs()[path].nbytes

  def read_slices(
    self, path: typing.Path, axis: int, first: int, stop: int
  ) -> np.ndarray:
    """The part of a leaf from `first` to before `stop` along one axis."""
    where = (*[slice(None)] * axis, slice(first, stop))
    return np.asarray(self.leaves([path])[path])[where]

  def has_slices(self, path: typing.Path, axis: int) -> bool:
    """True if `read_slices` along an axis reads little beside its part."""
    del path, axis
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

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    return {path: self._leaves[path] for path in paths}


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


def damaged(
  path: os.PathLike | str, what: str, error: Exception
) -> errors.CheckpointError:
  """The error for headers that the library of their format cannot read.

  Args:
    path: of the checkpoint.
    what: it looks like: `'an orbax checkpoint'`.
    error: what the library raised.
  """
  return errors.CheckpointError(
    f'{path} looks like {what} but cannot be read ({type(error).__name__}). It '
    'is damaged or was cut short; restore it from a copy, or use an earlier '
    'step.'
  )
