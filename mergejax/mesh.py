# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Meshes, and the rules that lay arrays out on them.

The only place that builds a `Mesh`. The axes are always `branch` (experts side
by side, outermost: the one that may cross a slow network), `data`, `expert`
(mixture-of-experts) and `model`, each of size 1 unless asked for, so that one
set of definitions serves one device and a pod.
"""

from collections.abc import Mapping, Sequence
import math

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import typing

AXES = ('branch', 'data', 'expert', 'model')

# Logical axis -> mesh axis; the first rule whose mesh axis an array does not
# use yet wins. T5X's standard rules, with the two expert axes added.
RULES = (
  ('branch', 'branch'),
  ('expert', 'expert'),
  ('batch', 'data'),
  ('vocab', 'model'),
  ('mlp', 'model'),
  ('heads', 'model'),
  ('joined_kv', 'model'),
  ('embed', None),
  ('kv', None),
  ('relpos_buckets', None),
  ('length', None),
  ('layers', None),
)


def join_processes(
  coordinator_address: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
) -> None:
  """Makes the processes of a run one program; call it before anything else.

  Args:
    coordinator_address: `host:port` of the first process. On a TPU pod, under
      Slurm and the like, leave all three out: the environment tells.
    process_count: how many processes there are.
    process_index: which one this is, from 0.

  Raises:
    UserError: the processes could not find each other.
  """
  # The default on CPU has no collectives between processes.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      coordinator_address, process_count, process_index
    )
  except (ValueError, RuntimeError) as error:
    raise errors.ConfigError(
      f'The processes could not join ({error}). Give --coordinator_address, '
      '--process_count and --process_index to every one of them.'
    ) from error


def make_mesh(
  *,
  branch: int = 1,
  data: int = -1,
  expert: int = 1,
  model: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """Builds the mesh `(branch, data, expert, model)`.

  Args:
    branch: experts side by side.
    data: data parallelism; -1 takes the devices that are left.
    expert: expert parallelism of mixture-of-experts layers.
    model: tensor parallelism.
    devices: defaults to all devices of all processes.

  Returns:
    A mesh whose axes are `Auto`: the compiler propagates shardings from those
    of the arguments.

  Raises:
    UserError: the sizes do not multiply to the number of devices.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'branch': 1, 'data': 1, 'expert': 1, 'model': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(branch=branch, data=data, expert=expert, model=model)
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if (
    len(free) > 1
    or len(devices) % max(fixed, 1)
    or (not free and fixed != len(devices))
  ):
    raise errors.ConfigError(
      f'Mesh {sizes} does not fit {len(devices)} device(s): the sizes must '
      f'multiply to {len(devices)}, with at most one -1 for what is left.'
    )
  for name in free:
    sizes[name] = len(devices) // fixed
  return jax.make_mesh(
    tuple(sizes[name] for name in AXES),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
    devices=devices,
  )


def sharding(
  mesh: jax.sharding.Mesh,
  logical: Sequence[str | None],
  shape: Sequence[int] | None = None,
  rules: Sequence[tuple[str, str | None]] = RULES,
) -> NamedSharding:
  """Sharding of one array with named axes.

  Args:
    mesh: from `make_mesh`.
    logical: logical name of every axis of the array, None for no name.
    shape: sizes; an axis that its mesh axis does not divide is replicated
      (a vocabulary of 259 on two model shards).
    rules: `(logical axis, mesh axis or None)`, see `RULES`.

  Returns:
    A `NamedSharding` on `mesh`.

  Raises:
    UserError: a logical axis that no rule names.
  """
  known = {name for name, _ in rules}
  used, spec = set(), []
  for i, name in enumerate(logical):
    chosen = None
    if name is not None:
      if name not in known:
        raise errors.ConfigError(errors.near(name, known, 'logical axis'))
      for rule_name, target in rules:
        if rule_name != name or target is None or target in used:
          continue
        if shape is None or shape[i] % mesh.shape[target] == 0:
          chosen = target
          break
    used.add(chosen)
    spec.append(chosen)
  return NamedSharding(mesh, PartitionSpec(*spec))


def param_shardings(
  mesh: jax.sharding.Mesh, specs: Mapping[typing.Path, typing.LeafSpec]
) -> dict[typing.Path, NamedSharding]:
  """Sharding of every parameter, from its logical axes (see `axes`)."""
  logical = axes_lib.logical_axes(specs)
  return {
    path: sharding(mesh, logical[path], spec.shape)
    for path, spec in specs.items()
  }


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_host(tree: typing.Tree) -> typing.Tree:
  """Fetches arrays to every process, also those spread over processes."""

  def fetch(leaf):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)

  return jax.tree.map(fetch, tree)
