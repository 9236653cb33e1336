# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""K experts as K slices of one pytree, trained side by side in one program.

Every leaf of the training state gets a leading axis `[experts, ...]`, laid out
on the mesh axis `branch`. The step is the ordinary one, mapped over that axis:
norms, clipping and normalisers are each expert's own, and no collective crosses
`branch` between merges.

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import mesh as mesh_lib
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.training import loop
from mergejax.training import step as step_lib
from mergejax.training import streams as streams_lib


def branch_state(
  seed: step_lib.TrainState, experts: int
) -> step_lib.TrainState:
  """Copies a seed K times; the step, the moments and the schedule go on.

  Args:
    seed: state of the seed model.
    experts: K.

  Returns:
    The same state with a leading axis K on every leaf; each expert's random
    key is folded with its number.
  """
  stacked = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf, (experts, *jnp.shape(leaf))), seed
  )
  fold = lambda i: jax.random.key_data(
    jax.random.fold_in(jax.random.wrap_key_data(seed.key), i)
  )
  return stacked.replace(key=jax.vmap(fold)(jnp.arange(experts)))


def check_experts(experts: int, mesh: jax.sharding.Mesh) -> None:
  """Raises if K experts do not divide over the branch axis of a mesh."""
  size = mesh.shape['branch']
  if experts % size:
    raise errors.StructureError(
      f'{experts} experts do not divide over {size} branches of the mesh: '
      f'choose a number of branches that divides {experts}.'
    )


def map_experts(
  fn: Callable[..., Any],
  mesh: jax.sharding.Mesh,
  *,
  batched: bool | None = None,
) -> Callable[..., Any]:
  """Maps a function of one expert over the leading axis of its arguments.

  Args:
    fn: a function of one expert's state and batch.
    mesh: its `branch` axis holds K / branches experts on each slice.
    batched: run the experts of a slice as one batch (the better use of an
      accelerator) or one after the other (less memory; on a CPU also faster,
      because an expert's activations stay in the cache). By default one after
      the other on CPU, batched elsewhere. The numbers are the same.

  Returns:
    A function whose arguments and results have a leading axis K.
  """
  if batched is None:
    batched = mesh.devices.flat[0].platform != 'cpu'
  branches = mesh.shape['branch']
  one_slice = (
    jax.vmap(fn)
    if batched
    else lambda *args: jax.lax.map(lambda packed: fn(*packed), args)
  )
  if branches == 1:
    return one_slice

  def mapped(*args):
    # [experts, ...] -> [branches, experts / branches, ...] and back
    fold = lambda x: x.reshape(branches, -1, *x.shape[1:])
    unfold = lambda x: x.reshape(-1, *x.shape[2:])
    result = jax.vmap(one_slice, spmd_axis_name='branch')(
      *jax.tree.map(fold, args)
    )
    return jax.tree.map(unfold, result)

  return mapped


def state_shardings(
  mesh: jax.sharding.Mesh, state: Any, *, stacked: bool
) -> Any:
  """Shardings of a training state: parameters and moments by logical axes.

  Args:
    mesh: from `mesh.make_mesh`.
    state: a `TrainState` of arrays or shapes.
    stacked: leaves have a leading axis of experts.

  Returns:
    A tree of shardings. An optimizer leaf follows the parameter whose path its
    own path ends with, if their shapes agree; other leaves are replicated
    within a branch.
  """
  lead = ('branch',) if stacked else ()
  params = {
    path: typing.LeafSpec(spec.shape[len(lead) :], spec.dtype)
    for path, spec in tree_lib.specs(state.params).items()
  }
  logical = mesh_lib.axes_lib.logical_axes(params)

  def one(path, leaf):
    shape = tuple(leaf.shape)
    parts = path.split('/')
    for i in range(len(parts)):
      name = '/'.join(parts[i:])
      if name in params and params[name].shape == shape[len(lead) :]:
        return mesh_lib.sharding(mesh, lead + logical[name], shape)
    names = lead + (None,) * (len(shape) - len(lead))
    return mesh_lib.sharding(mesh, names, shape)

  return tree_lib.map_paths(one, state)


def place_state(mesh: jax.sharding.Mesh, state: Any, *, stacked: bool) -> Any:
  """Puts a training state on the mesh, see `state_shardings`."""
  return jax.jit(
    lambda s: s, out_shardings=state_shardings(mesh, state, stacked=stacked)
  )(state)


def compile_step(
  step_fn: step_lib.StepFn,
  mesh: jax.sharding.Mesh,
  state: Any,
  *,
  stacked: bool,
  batched: bool | None = None,
) -> Callable[..., Any]:
  """Compiles a step for a mesh; the state is donated and keeps its layout.

  Args:
    step_fn: the step of one model.
    mesh: where to run.
    state: a state with the shapes of the run.
    stacked: the state holds experts.
    batched: see `map_experts`.

  Returns:
    `step(state, batch) -> (state, metrics)`; metrics of experts are `[K]`,
    laid out on `branch`, so that fetching them is the only communication.
  """
  shardings = state_shardings(mesh, state, stacked=stacked)
  mapped = map_experts(step_fn, mesh, batched=batched) if stacked else step_fn
  metrics = mesh_lib.sharding(mesh, ('branch',) if stacked else ())
  return jax.jit(
    mapped, donate_argnums=(0,), out_shardings=(shardings, metrics)
  )


def batch_placer(
  mesh: jax.sharding.Mesh, *, stacked: bool, local_rows: bool = False
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
  """Puts host batches on the mesh: experts on `branch`, rows on `data`.

  Args:
    mesh: from `mesh.make_mesh`.
    stacked: batches have a leading axis of this process's experts (see
      `local_experts`), each with all its rows.
    local_rows: of one model's batch this process holds only its own rows (see
      `data_shard`). By default it holds all of them, and each device takes its
      part, so that the numbers do not depend on the number of processes.
  """
  lead = ('branch',) if stacked else ()

  def place(batch):
    placed = {}
    for name, leaf in batch.items():
      names = lead + ('batch',) + (None,) * (leaf.ndim - len(lead) - 1)
      target = mesh_lib.sharding(mesh, names)
      if local_rows:
        placed[name] = jax.make_array_from_process_local_data(target, leaf)
        continue
      shape, offset = leaf.shape, 0
      if stacked:
        mine = local_slices(mesh, 'branch')
        per_branch = shape[0] // len(mine)
        shape = (per_branch * mesh.shape['branch'], *shape[1:])
        offset = mine[0] * per_branch

      def part(index, leaf=leaf, offset=offset, size=shape[0]):
        start, stop, _ = index[0].indices(size)
        return leaf[(slice(start - offset, stop - offset), *index[1:])]

      placed[name] = jax.make_array_from_callback(shape, target, part)
    return placed

  return place


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


def local_experts(mesh: jax.sharding.Mesh, experts: int) -> list[int]:
  """The experts whose data this process must read."""
  check_experts(experts, mesh)
  per_branch = experts // mesh.shape['branch']
  return [
    branch * per_branch + i
    for branch in local_slices(mesh, 'branch')
    for i in range(per_branch)
  ]


class StackedStream(streams_lib.PartsStream):
  """One stream per expert, read together: batches get a leading axis."""

  def __init__(
    self,
    streams: Sequence[loop.Stream],
    experts: Sequence[int] | None = None,
  ):
    """Reads the experts of this process.

    Args:
      streams: one an expert.
      experts: their numbers among all experts, from `local_experts`; by default
        these are all of them.
    """
    numbers = range(len(streams)) if experts is None else experts
    super().__init__(dict(zip(numbers, streams, strict=True)), join=np.stack)


def unstack(stacked: typing.Tree, index: int) -> typing.Tree:
  """The parameters of one expert."""
  return jax.tree.map(lambda leaf: leaf[index], stacked)
