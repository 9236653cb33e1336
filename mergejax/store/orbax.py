# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints: a parameter tree, an item of a step, or a run's folder."""

import pathlib
import re

import jax
import numpy as np

from mergejax import errors
from mergejax import tree as tree_lib
from mergejax import typing
from mergejax.store import base

# Items of a step that may hold parameters, in the order they are looked for.
_ITEMS = ('default', 'params', 'state')
# Where parameters lie inside a training state: ours, then T5X's.
_SUBTREES = ('params', 'target')


def locate(path: pathlib.Path) -> pathlib.Path | None:
  """The tree directory meant by `path`, or None if there is no orbax one.

  `path` may be the tree itself, a step that holds it as an item, or a folder
  of steps (`7` or `checkpoint_7`), of which the last one is meant.
  """
  if (path / '_METADATA').is_file():
    return path
  for item in _ITEMS:
    if (path / item / '_METADATA').is_file():
      return path / item
  if path.is_dir():
    steps = []
    for child in path.iterdir():
      match = re.fullmatch(r'(?:checkpoint_)?(\d+)', child.name)
      if match and locate(child) is not None:
        steps.append((int(match[1]), child))
    if steps:
      return locate(max(steps)[1])
  return None


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


class OrbaxStore(base.ParamStore):
  """Reads parameters of an orbax checkpoint leaf by leaf.

  A training state (with `params`, or T5X's `target`, at the top) shows its
  parameters only.
  """

  def __init__(self, path: pathlib.Path):
    self._directory = locate(path).absolute()
    self._checkpointer = _checkpointer()
    try:
      metadata = self._checkpointer.metadata(self._directory).item_metadata
      self._tree = metadata.tree
    except Exception as error:  # orbax raises many kinds on damaged metadata
      raise errors.UserError(
        f'{path} looks like an orbax checkpoint but its metadata cannot be '
        f'read ({type(error).__name__}). It is damaged or was cut short; '
        'restore it from a copy, or use an earlier step.'
      ) from error
    self._root = ''
    if isinstance(self._tree, dict) and set(self._tree) & {
      'opt_state',
      'state',
    }:
      for name in _SUBTREES:
        if name in self._tree:
          self._root = name + '/'
    self._specs = {
      name[len(self._root) :]: tree_lib.leaf_spec(leaf)
      for name, leaf in tree_lib.flatten(self._tree).items()
      if name.startswith(self._root)
    }
    self.provenance = {'format': 'orbax', 'path': str(path)}

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self):
    # Of this step: a run's folder holds others as well.
    return sorted(f for f in self._directory.rglob('*') if f.is_file())

  def leaves(self, paths):
    ocp = _library()
    wanted = {self._root + path for path in paths}
    # Placeholders are not read; every other leaf arrives in host memory.
    item = tree_lib.map_paths(
      lambda path, _: 0 if path in wanted else ocp.PLACEHOLDER, self._tree
    )
    how = tree_lib.map_paths(
      lambda path, _: ocp.RestoreArgs(restore_type=np.ndarray), self._tree
    )
    try:
      restored = self._checkpointer.restore(
        self._directory,
        args=ocp.args.PyTreeRestore(item=item, restore_args=how),
      )
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise errors.UserError(
        f'{self.name}: the checkpoint lists parameters that cannot be read '
        f'({str(error).splitlines()[0][:200]}). It is damaged or incomplete.'
      ) from error
    leaves = tree_lib.flatten(restored)
    return {path: np.asarray(leaves[self._root + path]) for path in paths}


def write(path: pathlib.Path, leaves) -> None:
  """Writes `{path: array}` as one orbax tree; `path` must not exist."""
  # Of NumPy's scalars orbax knows some; it knows arrays of all numbers.
  leaves = {
    name: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf
    for name, leaf in leaves.items()
  }
  base.check_zarr(tree_lib.specs(leaves))
  _checkpointer().save(path.absolute(), tree_lib.unflatten(leaves), force=True)
