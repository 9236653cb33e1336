# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Devices of one or many processes, as a mesh of named axes.

The only place that builds a `Mesh`. The axes are always `branch` (experts side
by side, outermost: the one that may cross a slow network), `data`, `expert`
(mixture-of-experts) and `model`, each of size 1 unless asked for, so that one
set of definitions serves one device and a pod.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.experimental import mesh_utils

from mergejax.core import errors

AXES = ('branch', 'data', 'expert', 'model')
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


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
  devices: Sequence[Any] | None = None,
  **unknown: Any,
) -> jax.sharding.Mesh:
  """Builds the mesh `(branch, data, expert, model)`.

  Args:
    branch: experts side by side.
    data: data parallelism; -1 takes the devices that are left.
    expert: expert parallelism of mixture-of-experts layers.
    model: tensor parallelism.
    devices: defaults to all devices of all processes.
    **unknown: axes that a mesh does not have; see below.

  Returns:
    A mesh whose axes are `Auto`: the compiler propagates shardings from those
    of the arguments. Of several TPU slices, `branch` goes over the network
    between them, then `data`; what an expert shares stays inside a slice. An
    axis that is no product of sides of a slice takes a part of one, whose ends
    are not joined: branch 64 and data 32 on v5p:8x16x16.

  Raises:
    UserError: an axis of another name, a size that is no whole number, sizes
      that do not multiply to the number of devices, or branch and data that
      cannot cross the slices that these are of.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'branch': 1, 'data': 1, 'expert': 1, 'model': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(branch=branch, data=data, expert=expert, model=model)
  for name in unknown:
    raise errors.ConfigError(errors.near(name, AXES, 'mesh axis'))
  for name, size in sizes.items():
    if size != -1:
      errors.check_whole(f'Mesh axis {name}', size)
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if (
    len(free) > 1
    or len(devices) % fixed
    or (not free and fixed != len(devices))
  ):
    raise errors.ConfigError(
      f'Mesh {sizes} does not fit {len(devices)} device(s): the sizes must '
      f'multiply to {len(devices)}, with at most one -1 for what is left.'
    )
  for name in free:
    sizes[name] = len(devices) // fixed
  shape = tuple(sizes[name] for name in AXES)
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices > 1:
    laid_out = _over_slices(devices, slices, shape)
  else:
    laid_out = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return jax.sharding.Mesh(laid_out, AXES, axis_types=kinds)


def abstract_mesh(
  *, branch: int = 1, data: int = 1, expert: int = 1, model: int = 1
) -> jax.sharding.AbstractMesh:
  """The mesh `(branch, data, expert, model)` of devices that need not be here.

  A program can be traced and exported for it, not run.

  Args:
    branch: as of `make_mesh`.
    data: likewise.
    expert: likewise.
    model: likewise.

  Raises:
    ConfigError: a size that is no whole number.

  Example:
    >>> abstract_mesh(data=4, model=2).size
    8
  """
  sizes = dict(branch=branch, data=data, expert=expert, model=model)
  for name, size in sizes.items():
    errors.check_whole(f'Mesh axis {name}', size)
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.AbstractMesh(
    tuple(sizes.values()), AXES, axis_types=kinds
  )


def _over_slices(devices, slices, shape):
  """Devices of several slices, the outermost axes over the slow network.

  `branch` crosses slices as far as its size allows, then `data`; all other
  axes stay inside a slice.
  """
  branch = math.gcd(slices, shape[0])
  data = slices // branch
  if shape[1] % data:
    raise errors.ConfigError(
      f'{slices} slices must divide branch x data of the mesh '
      f'{dict(zip(AXES, shape))}: other axes do not cross the slow network '
      'between slices.'
    )
  outer = (branch, data) + (1,) * (len(shape) - 2)
  inner = tuple(whole // part for whole, part in zip(shape, outer))
  return mesh_utils.create_hybrid_device_mesh(
    inner, outer, devices=devices, allow_split_physical_axes=True
  )
