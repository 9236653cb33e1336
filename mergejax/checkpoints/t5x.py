# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5X's own checkpoints (version 3), without T5X.

A directory holds `checkpoint`, a msgpack tree `{version, optimizer: {target,
state}}`, and one zarr directory an array; a leaf of the tree is an array or
says which zarr directory holds it. Early ones are a single msgpack file.
"""

from collections.abc import Mapping, Sequence
import pathlib
import re
from typing import Any

import jax
import numpy as np

from mergejax.checkpoints import axes_file
from mergejax.checkpoints import base
from mergejax.checkpoints import states
from mergejax.checkpoints import windows
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

FILE = 'checkpoint'
_TENSORFLOW = b'model_checkpoint_path'
# Older trees than this lie differently; T5X refuses them too.
VERSION = 3
# Collection of T5X's layers that names the axes of each parameter.
_AXES, _SUFFIX = 'params_axes', '_axes'


def locate(path: pathlib.Path) -> pathlib.Path | None:
  """The msgpack file meant by a file, a step's folder or a run's folder."""
  if path.is_file():
    return path if _is_tree(path) else None
  if (path / FILE).is_file() and not (path / '_METADATA').exists():
    return path / FILE if _is_tree(path / FILE) else None
  steps = []
  if path.is_dir():
    for child in path.iterdir():
      match = re.fullmatch(r'checkpoint_(\d+)', child.name)
      if match and (child / FILE).is_file() and _is_tree(child / FILE):
        steps.append((int(match[1]), child / FILE))
  return max(steps)[1] if steps else None


def _is_tree(file: pathlib.Path) -> bool:
  """True if a file begins like the msgpack of T5X: a map with these keys."""
  with open(file, 'rb') as stream:
    start = stream.read(64)
  if start.startswith(_TENSORFLOW):
    raise errors.CheckpointError(
      f'{file} belongs to a TensorFlow checkpoint (Mesh TensorFlow T5). '
      'Convert it with T5X first.'
    )
  # A map of two to three entries, the first of which is one of these.
  return start[:1] in (b'\x82', b'\x83') and (
    b'version' in start[:16] or b'optimizer' in start[:16]
  )


def _axes(data, mutables) -> dict[typing.Path, tuple[str, ...]]:
  """Axes by path, from T5X's `params_axes` (`kernel_axes` beside `kernel`)."""
  places = (data, data['optimizer'], mutables)
  found = next((place[_AXES] for place in places if place.get(_AXES)), {})
  result = {}

  def collect(node, path):
    for name, child in node.items():
      child_path = f'{path}/{name}' if path else str(name)
      names = _axis_names(child)
      if names is not None and child_path.endswith(_SUFFIX):
        result[child_path.removesuffix(_SUFFIX)] = names
      elif isinstance(child, Mapping):
        collect(child, child_path)

  collect(found, '')
  return result


def _axis_names(node) -> tuple[str, ...] | None:
  """Names of an AxisMetadata, a list, or a tuple as msgpack has it."""
  if isinstance(node, Mapping) and set(node) == {'names'}:
    node = node['names']
  if isinstance(node, Mapping) and set(node) == set(map(str, range(len(node)))):
    node = [node[str(i)] for i in range(len(node))]
  if not isinstance(node, (list, tuple)):
    return None
  # An axis that is not laid over any mesh axis may have no name.
  names = tuple('unnamed' if name is None else name for name in node)
  return names if all(isinstance(name, str) for name in names) else None


class T5xStore(windows.ChunkedStore):
  """Reads the parameters (`optimizer/target`) of a T5X checkpoint."""

  def __init__(self, path: pathlib.Path, *, whole: bool = False):
    """Opens a checkpoint by its msgpack tree.

    Args:
      path: see `locate`.
      whole: show all that a training state is, `target/...` and `state/...`;
        by default the parameters alone, without `target/`.
    """
    import flax.serialization  # pylint: disable=import-outside-toplevel

    file = locate(path)
    if file is None:
      raise errors.CheckpointError(f'{path} is no T5X checkpoint.')
    self._folder = file.parent.absolute()
    self.provenance = {'format': 't5x', 'path': str(path)}
    try:
      data: Any = flax.serialization.msgpack_restore(file.read_bytes())
      version = data.get('version')
      target = data['optimizer'].get('target') or {}
      state = data['optimizer'].get('state') or {}
      mutables = data['optimizer'].get('flax_mutables') or {}
      stats = mutables.get(states.BATCH_STATS)
    except Exception as error:  # msgpack raises many kinds on damaged bytes
      raise base.damaged(file, 'a T5X checkpoint', error) from error
    if version != VERSION:
      raise errors.CheckpointError(
        f'{file} has version {version}; version {VERSION} is known. Load and '
        'save it once with T5X.'
      )
    if not target and not whole:
      raise errors.CheckpointError(
        f'{file} holds optimizer state '
        f'({", ".join(sorted(state)) or "nothing"}) but no parameters: its '
        "'target' is empty."
      )
    self._entries: dict[typing.Path, Any] = {}
    self._collect(target, 'target' if whole else '')
    if whole:
      self._collect(state, 'state')
    elif stats:
      self._collect(stats, states.BATCH_STATS)
    left_out = ['state'] if state.get('param_states') and not whole else []
    left_out += sorted(set(mutables) - {states.BATCH_STATS, _AXES})
    if left_out:
      self.provenance['left_out'] = left_out
    self._specs = {p: self._spec(p, e) for p, e in self._entries.items()}
    if not whole:
      axes_file.attach(self, _axes(data, mutables))

  def _collect(self, node, path):
    if isinstance(node, dict) and not {'driver', 'kvstore'} <= set(node):
      for name, child in node.items():
        self._collect(child, f'{path}/{name}' if path else str(name))
    else:
      self._entries[path] = node

  def _spec(self, path, entry):
    if not isinstance(entry, dict):
      return tree_lib.leaf_spec(np.asarray(entry))
    try:
      dtype = str(entry['dtype'])
      shape = tuple(int(n) for n in entry['metadata']['shape'])
    except (KeyError, TypeError, ValueError) as error:
      raise errors.CheckpointError(
        f'{self.name}: the entry of {path} is damaged ({error!r}).'
      ) from error
    if dtype == 'uint16':
      raise errors.CheckpointError(
        f'{self.name}: {path} is uint16, an encoding of bfloat16 that T5X has '
        'given up. Save the model again with a current T5X.'
      )
    return typing.LeafSpec(shape, np.dtype(jax.numpy.dtype(dtype)))

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self) -> list[pathlib.Path]:
    # Files, not the folder: a run's folder holds other steps as well.
    files = [self._folder / FILE]
    for entry in self._entries.values():
      if isinstance(entry, dict):
        files += [f for f in self._place(entry).rglob('*') if f.is_file()]
    return sorted(f for f in files if f.exists())

  def _place(self, entry) -> pathlib.Path:
    """The zarr directory of an entry; never outside of the checkpoint."""
    place = (self._folder / str(entry['kvstore']['path'])).resolve()
    if not place.is_relative_to(self._folder.resolve()):
      raise errors.CheckpointError(
        f'{self.name} names an array outside of its folder: {place}.'
      )
    return place

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    import tensorstore  # pylint: disable=import-outside-toplevel

    waiting = {}
    for path in paths:
      entry = self._entries[path]
      if isinstance(entry, dict):
        place = self._place(entry)
        if not place.is_dir():
          raise errors.CheckpointError(
            f'{self.name}: the array of {path} is missing ({place}). The copy '
            'of this checkpoint is incomplete.'
          )
        spec = self._open_spec(place, entry, path)
        waiting[path] = tensorstore.open(spec)
    result = {}
    for path in paths:
      try:
        result[path] = np.asarray(
          waiting[path].result().read().result()
          if path in waiting
          else self._entries[path]
        )
      except Exception as error:  # tensorstore raises many kinds
        raise errors.CheckpointError(
          f'{self.name}: {path} cannot be read ({errors.first_line(error)}).'
        ) from error
      if result[path].shape != self._specs[path].shape:
        raise errors.CheckpointError(
          f'{self.name}: {path} is {list(result[path].shape)} on disk but '
          f'{list(self._specs[path].shape)} in the tree.'
        )
    return result

  def _open_array(self, path):
    import tensorstore  # pylint: disable=import-outside-toplevel

    entry = self._entries[path]
    place = self._place(entry) if isinstance(entry, dict) else None
    if place is None or not place.is_dir():
      return None
    try:
      return tensorstore.open(self._open_spec(place, entry, path)).result()
    except ValueError:  # what reads it whole says what is wrong with it
      return None

  def _open_spec(self, place, entry, path):
    """What is on disk decides how to read, except where `.zarray` was lost."""
    spec = {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{place}/'},
      'open': True,
    }
    if not (place / '.zarray').is_file():
      dtype = self._specs[path].dtype
      spec['assume_metadata'] = True
      spec['metadata'] = zarr_metadata(
        self._specs[path].shape, dtype, entry['metadata']['chunks']
      )
    return spec


def zarr_metadata(
  shape: Sequence[int], dtype: np.dtype, chunks: Sequence[int]
) -> dict[str, Any]:
  """What T5X writes into the `.zarray` of an array."""
  # Dtypes of ml_dtypes go by their names in tensorstore's zarr.
  name = dtype.name if dtype.isbuiltin == 2 else dtype.str
  return {
    'zarr_format': 2,
    'shape': list(shape),
    'chunks': list(chunks),
    'dtype': name,
    'compressor': {'id': 'gzip', 'level': 1},
    'fill_value': None,
    'filters': None,
    'order': 'C',
  }
