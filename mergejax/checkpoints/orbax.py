# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: a parameter tree, an item of a step, or a run's folder."""

from collections.abc import Mapping
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import states
from mergejax.checkpoints import windows
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

# Items of a step that may hold parameters, in the order they are looked for.
_ITEMS = ('default', 'params', 'state', 'train_state', 'model')

# How orbax numbers the keys of dicts.
_DICT = 2


def locate(path: pathlib.Path) -> pathlib.Path | None:
  """The tree directory meant by `path`, or None if there is no orbax one.

  `path` may be the tree itself, a step that holds it as an item, or a folder
  of steps (`7`, `checkpoint_7`, `step_7`), of which the last one is meant.
  """
  if (path / '_METADATA').is_file():
    return path
  for item in _ITEMS:
    if (path / item / '_METADATA').is_file():
      return path / item
  if not path.is_dir():
    return None
  items = [child.parent for child in path.glob('*/_METADATA')]
  steps = []
  for child in path.iterdir():
    match = re.fullmatch(r'(?:[A-Za-z]\w*_)?(\d+)', child.name)
    if match and locate(child) is not None:
      steps.append((int(match[1]), child))
  if steps:
    return locate(max(steps)[1])
  # The item of a step, whatever it is called, if there is no other.
  return items[0] if len(items) == 1 else None


def _other_items(item: pathlib.Path) -> list[str]:
  """Trees of a step beside the one that is read, such as optimizers' states."""
  if item.name not in _ITEMS:
    return []
  others = [child.parent.name for child in item.parent.glob('*/_METADATA')]
  return sorted(set(others) - {item.name})


def _library():
  """orbax, which takes as long to import as a small merge takes to run."""
  import orbax.checkpoint  # pylint: disable=import-outside-toplevel

  return orbax.checkpoint


def _checkpointer():
  """A checkpointer of this process alone: it waits for no other one."""
  ocp = _library()
  here = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=here,
    active_processes={here},
    barrier_sync_key_prefix=f'{here}',
  )
  return ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
    multiprocessing_options=options,
  )


class OrbaxStore(windows.ChunkedStore):
  """Reads parameters of an orbax checkpoint leaf by leaf.

  A training state shows its parameters only; see `states.parameters`.
  """

  def __init__(self, path: pathlib.Path, *, whole: bool = False):
    """Opens a tree by its metadata.

    Args:
      path: see `locate`.
      whole: show a training state as it lies, not its parameters alone.
    """
    directory = locate(path)
    if directory is None:
      raise errors.CheckpointError(f'{path} is no orbax checkpoint.')
    self._directory = directory.absolute()
    self._checkpointer = _checkpointer()
    self._abouts: dict[pathlib.Path, dict[str, Any]] = {}  # see `_open_array`
    self._trees = {self._directory: self._metadata(self._directory, path)}
    tree = self._trees[self._directory]
    found = (
      states.Parts({name: name for name in tree_lib.flatten(tree)}, [])
      if whole
      else states.parameters(tree, str(path))
    )
    self._place = {p: (self._directory, own) for p, own in found.paths.items()}
    others = _other_items(self._directory)
    if states.BATCH_STATS in others:
      others.remove(states.BATCH_STATS)
      item = self._directory.with_name(states.BATCH_STATS)
      self._trees[item] = self._metadata(item, path)
      for own in tree_lib.flatten(self._trees[item]):
        self._place[f'{states.BATCH_STATS}/{own}'] = item, own
    leaves = {d: tree_lib.flatten(tree) for d, tree in self._trees.items()}
    self._specs = {
      shown: tree_lib.leaf_spec(leaves[directory][own])
      for shown, (directory, own) in self._place.items()
    }
    self.provenance = {'format': 'orbax', 'path': str(path)}
    left_out = found.left_out + others
    if left_out:
      self.provenance['left_out'] = left_out

  def _metadata(self, directory, path):
    try:
      metadata: Any = self._checkpointer.metadata(directory).item_metadata
      return metadata.tree
    except Exception as error:  # orbax raises many kinds on damaged metadata
      raise base.damaged(path, 'an orbax checkpoint', error) from error

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self) -> list[pathlib.Path]:
    # Of this step: a run's folder holds others as well.
    return sorted(f for d in self._trees for f in d.rglob('*') if f.is_file())

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    result = {}
    for directory in self._trees:
      own = [path for path in paths if self._place[path][0] == directory]
      if own:
        stored = [self._place[path][1] for path in own]
        leaves = self._read(directory, stored)
        result.update((p, np.asarray(leaves[s])) for p, s in zip(own, stored))
    return result

  def _open_array(self, path):
    import tensorstore  # pylint: disable=import-outside-toplevel

    directory, stored = self._place[path]
    if directory not in self._abouts:
      text = (directory / '_METADATA').read_text()
      self._abouts[directory] = json.loads(text)
    about = self._abouts[directory]
    folder = stored.replace('/', '.') + '/'
    kvstore: dict[str, Any] = {
      'driver': 'file',
      'path': f'{directory}/{folder}',
    }
    if about.get('use_ocdbt'):
      kvstore = {
        'driver': 'ocdbt',
        'base': {'driver': 'file', 'path': f'{directory}/'},
        'path': folder,
      }
    driver = 'zarr3' if about.get('use_zarr3') else 'zarr'
    try:
      found = tensorstore.open(
        {'driver': driver, 'kvstore': kvstore, 'open': True}
      ).result()
    except ValueError:  # how other writers lay arrays out, orbax itself knows
      return None
    spec = self._specs[path]
    sound = tuple(found.shape) == spec.shape
    return found if sound and found.dtype.numpy_dtype == spec.dtype else None

  def _read(self, directory, paths):
    ocp = _library()
    wanted, tree = set(paths), self._trees[directory]
    # Placeholders are not read; every other leaf arrives in host memory.
    item = tree_lib.map_paths(
      lambda path, _: 0 if path in wanted else ocp.PLACEHOLDER, tree
    )
    how = tree_lib.map_paths(
      lambda path, _: ocp.RestoreArgs(restore_type=np.ndarray), tree
    )
    try:
      restored = self._checkpointer.restore(
        directory, args=ocp.args.PyTreeRestore(item=item, restore_args=how)
      )
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise errors.CheckpointError(
        f'{self.name}: the checkpoint lists parameters that cannot be read '
        f'({errors.first_line(error)}). It is damaged or incomplete.'
      ) from error
    return tree_lib.flatten(restored)


def write_tree(path: pathlib.Path, names: list[typing.Path]) -> None:
  """Writes what orbax says of a tree whose arrays lie in folders, not OCDBT.

  Not by orbax, which asks all processes that JAX knows of when it writes.

  Args:
    path: the directory.
    names: of the arrays; `a/b` lies in the folder `a.b`.
  """
  value = {'value_type': 'np.ndarray', 'skip_deserialize': False}
  tree = {}
  for name in names:
    keys = name.split('/')
    tree[str(tuple(keys))] = {
      'key_metadata': [{'key': key, 'key_type': _DICT} for key in keys],
      'value_metadata': value,
    }
  about = {
    'tree_metadata': tree,
    'use_ocdbt': False,
    'use_zarr3': False,
    'store_array_data_equal_to_fill_value': True,
    'custom_metadata': None,
  }
  handler = _library().PyTreeCheckpointHandler
  checkpoint = {
    'item_handlers': f'{handler.__module__}.{handler.__qualname__}',
    'metrics': {},
    'performance_metrics': {},
    'init_timestamp_nsecs': None,
    'commit_timestamp_nsecs': None,
    'custom_metadata': {},
  }
  (path / '_METADATA').write_text(json.dumps(about))
  (path / '_CHECKPOINT_METADATA').write_text(json.dumps(checkpoint))


def write(path: pathlib.Path, leaves) -> None:
  """Writes `{path: array}` as one orbax tree; `path` must not exist."""
  # Of NumPy's scalars orbax knows some; it knows arrays of all numbers.
  leaves = {
    name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    for name, leaf in leaves.items()
  }
  base.check_zarr(tree_lib.specs(leaves))
  _checkpointer().save(path.absolute(), tree_lib.unflatten(leaves), force=True)
