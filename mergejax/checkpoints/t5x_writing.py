# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes T5X's own checkpoints, with an optimizer's state or without."""

from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import t5x
from mergejax.core import tree as tree_lib
from mergejax.core import typing

# Means of rows and columns lie in the tree itself, as do arrays of shape [1]
# that stand for none.
_INLINE = ('v_row', 'v_col')


def write(
  path: pathlib.Path,
  leaves: Mapping[typing.Path, Any],
  step: int = 0,
  moments: Mapping[typing.Path, Any] | None = None,
) -> None:
  """Writes `{path: array}` as a T5X checkpoint.

  Args:
    path: the directory to create; T5X expects it to be called
      `checkpoint_STEP`.
    leaves: the parameters.
    step: the step that the checkpoint says it is of.
    moments: the optimizer's state, `{'PARAMETER/v_row': array, ...}` with
      `v_col`, `v` and `m` likewise; none by default, and then T5X can restore
      parameters alone.
  """
  moments = moments or {}
  base.check_zarr(tree_lib.specs(leaves))
  path.mkdir()
  target = {
    name: _array(path, f'target/{name}', np.asarray(leaf))
    for name, leaf in leaves.items()
  }
  states = {}
  for name, leaf in moments.items():
    leaf = np.asarray(leaf)
    inline = name.rpartition('/')[2] in _INLINE or leaf.shape == (1,)
    states[name] = (
      leaf if inline else _array(path, f'state/param_states/{name}', leaf)
    )
  write_tree(path, target, step, states)


def write_tree(
  path: pathlib.Path,
  target: Mapping[typing.Path, Any],
  step: int = 0,
  states: Mapping[typing.Path, Any] | None = None,
) -> None:
  """Writes the msgpack tree of a checkpoint, which says where arrays lie.

  Args:
    path: the directory of the checkpoint.
    target: an `entry` for each parameter.
    step: the step that the checkpoint says it is of.
    states: likewise for the optimizer's state; arrays that lie in the tree are
      given themselves.
  """
  import flax.serialization  # pylint: disable=import-outside-toplevel

  data = {
    'version': t5x.VERSION,
    'optimizer': {
      'target': tree_lib.unflatten(target),
      'state': {
        'step': np.asarray(step, np.int32),
        'param_states': tree_lib.unflatten(states or {}),
      },
    },
  }
  (path / t5x.FILE).write_bytes(flax.serialization.msgpack_serialize(data))


def _array(path, name, leaf):
  """Writes an array; returns what the tree says of it."""
  import tensorstore  # pylint: disable=import-outside-toplevel

  folder = f'{name.replace("/", ".")}/'
  metadata = t5x.zarr_metadata(leaf.shape, leaf.dtype, leaf.shape)
  store = tensorstore.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{path.absolute()}/{folder}'},
      'metadata': metadata,
    },
    create=True,
  ).result()
  store.write(leaf).result()
  return entry(folder, leaf.dtype, metadata)


def entry(
  folder: str, dtype: np.dtype, metadata: Mapping[str, Any]
) -> dict[str, Any]:
  """What the tree says of an array.

  Args:
    folder: of its chunks, below that of the checkpoint.
    dtype: of the array.
    metadata: `t5x.zarr_metadata` of it.
  """
  return {
    'driver': 'zarr',
    'dtype': dtype.name,
    'kvstore': {'driver': 'file', 'path': folder},
    'metadata': {k: metadata[k] for k in ('chunks', 'compressor', 'shape')},
  }
