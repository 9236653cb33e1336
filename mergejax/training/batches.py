# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training batches in host memory: checked, then put on the mesh.

A compiled program cannot refuse a token that the model has no row for: it
would train on, with a number that is wrong or none. A minimum and a maximum of
a batch cost microseconds here.
"""

from collections.abc import Callable, Mapping
import sys
from typing import Any, TextIO

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors


def checker(
  module: nn.Module | models.ModelFamily,
  source: str = 'the data',
  *,
  stacked: bool = False,
  objective: Any = None,
  stream: TextIO | None = None,
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
  """A function that checks a batch and gives it back.

  Args:
    module: the model, for its `vocab_size`, or its `classes`.
    source: where the batches come from, for the messages.
    stacked: batches have a leading axis of experts.
    objective: what is learned; its `check_batch(family, batch, source)`, if it
      has one, is asked too.
    stream: where to say that a batch held nothing to learn from, once; standard
      error by default.

  Returns:
    `check(batch) -> batch`. It raises a `UserError` for a token or a label that
    the model does not know.

  Example:
    >>> check = checker(models.build({'model_type': 'lm', 'vocab_size': 5}))
    >>> batch = {'decoder_input_tokens': np.array([[0, 3]]),
    ...          'decoder_target_tokens': np.array([[3, 1]])}
    >>> check(batch) is batch
    True
  """
  family = models.family_of(module)
  more = getattr(objective, 'check_batch', None)
  told = False

  def check(batch):
    nonlocal told
    family.check_batch(batch, source)
    if more is not None and not stacked:
      more(family, batch, source)
    elif more is not None:
      for i in range(len(next(iter(batch.values())))):
        own = {name: leaf[i] for name, leaf in batch.items()}
        more(family, own, f'{source} (expert {i} of this process)')
    if not told and _empty(family, batch, stacked):
      told = True
      print(
        f'A batch of {source} has no token to learn from: it is padding alone. '
        'Such steps change no parameter; this is said once.',
        file=stream or sys.stderr,
      )
    return batch

  return check


def _empty(family, batch, stacked):
  """Whether there is nothing to learn from, for any of the stacked experts."""
  weights = np.asarray(family.given_weights(batch))
  real = weights.reshape(len(weights) if stacked else 1, -1).any(axis=1)
  return not real.all()


def placer(
  mesh: jax.sharding.Mesh,
  rules: partition.ShardingRules,
  *,
  local_rows: bool = False,
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
  """A function that puts batches of one model on the mesh, rows on `data`.

  Args:
    mesh: from `partition.make_mesh`.
    rules: their `activations` say what `batch` is spread over.
    local_rows: this process holds only its own rows (see `data_shard`). By
      default it holds all of them, and each device takes its part, so that the
      numbers do not depend on the number of processes.

  Returns:
    `place(batch) -> batch`. It raises a `DataError` for rows that do not
    divide over the mesh.
  """
  layouts = {}
  if local_rows:
    # A slice of `data` that several processes share is read by each of them.
    rules = rules.replace(activations={'batch': 'data'})

  def layout(name, leaf):
    shape = np.shape(leaf)
    if shape not in layouts:
      axes = ('batch',) + (None,) * (len(shape) - 1) if shape else ()
      rows = (
        shape[0] * (data_shard(mesh)[1] if local_rows else 1) if shape else 0
      )
      check_rows(f'{name} of a batch', rows, mesh, rules)
      layouts[shape] = partition.sharding(
        mesh, axes, (rows, *shape[1:]), rules.activations
      )
    return layouts[shape]

  def place(batch):
    placed = {}
    for name, leaf in batch.items():
      target = layout(name, leaf)
      if local_rows:
        placed[name] = jax.make_array_from_process_local_data(target, leaf)
      else:
        placed[name] = whole(leaf, target)
    return placed

  return place


def check_rows(
  what: str, rows: int, mesh: jax.sharding.Mesh, rules: partition.ShardingRules
) -> None:
  """Raises a `DataError` for rows that do not divide over the mesh.

  Args:
    what: has these rows, for the message.
    rows: of one model, over all processes.
    mesh: from `partition.make_mesh`.
    rules: where they spread no `batch`, any number will do.
  """
  slices = mesh.shape['data']
  if rows % slices and rules.activations['batch']:
    raise errors.DataError(
      f'{what} has {rows} rows, which do not divide over {slices} data slices '
      f'of the mesh: choose a number of rows that {slices} divides, or another '
      'mesh.'
    )


def on_mesh(
  mesh: jax.sharding.Mesh, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """A batch that every process has all of, its rows over `data`.

  Rows that do not divide over it lie whole on every device.
  """
  placed = {}
  for name, leaf in batch.items():
    axes = ('batch', *[None] * (np.ndim(leaf) - 1))
    target = partition.sharding(mesh, axes, np.shape(leaf))
    placed[name] = whole(leaf, target)
  return placed


def whole(
  leaf: np.ndarray | jax.Array,
  target: jax.sharding.Sharding,
  *,
  alias: bool = True,
) -> jax.Array:
  """An array that every process has all of, each device taking its part.

  Args:
    leaf: the array.
    target: where its parts go.
    alias: what lies there already need not be copied; False if the result is to
      be overwritten.
  """
  if jax.process_count() == 1:
    return jax.device_put(leaf, target, may_alias=None if alias else False)
  leaf = np.asarray(leaf)
  return jax.make_array_from_callback(
    leaf.shape, target, lambda index: leaf[index]
  )


def local_slices(mesh: jax.sharding.Mesh, axis: str) -> list[int]:
  """The slices of a mesh axis that have a device of this process.

  Raises:
    UserError: they do not lie beside each other.
  """
  by_slice = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
  mine = [
    i
    for i, devices in enumerate(by_slice)
    if any(d.process_index == jax.process_index() for d in devices.flat)
  ]
  if mine != list(range(mine[0], mine[-1] + 1)):
    raise errors.StructureError(
      f'The slices of mesh axis {axis!r} that one process holds must lie '
      'beside each other.'
    )
  return mine


def data_shard(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """`(index, count)` of the part of a batch that this process reads."""
  mine = local_slices(mesh, 'data')
  return mine[0] // len(mine), mesh.shape['data'] // len(mine)
