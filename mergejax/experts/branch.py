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

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import outer as outer_lib
from mergejax.training import batches
from mergejax.training import loop
from mergejax.training import state as state_lib
from mergejax.training import streams as streams_lib
from mergejax.training import trainer


def branch_state(
  seed: state_lib.TrainState, experts: int
) -> state_lib.TrainState:
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


def stack_states(
  states: Sequence[state_lib.TrainState],
) -> state_lib.TrainState:
  """States of K models as one with a leading axis, in host memory.

  Each keeps its own key, so that a run does not depend on which experts train
  beside each other.

  Raises:
    ConfigError: states of different steps, which cannot run in one program.
  """
  steps = [state_lib.step_number(state) for state in states]
  if len(set(steps)) > 1:
    raise errors.ConfigError(
      f'Experts side by side make the same steps, and these have made {steps}: '
      'train them one after the other.'
    )
  return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def check_experts(experts: int, mesh: jax.sharding.Mesh) -> None:
  """Raises if K experts do not divide over the branch axis of a mesh."""
  size = mesh.shape['branch']
  if experts % size:
    raise errors.ConfigError(
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


class BranchTrainer(trainer.Trainer):
  """The trainer of one model, mapped over K experts side by side.

  `fit` starts every expert from the same seed: from its parameters (`params=`)
  or its whole state (`state=`), whose moments and step number go on; or each
  from a state of its own (`state=[...]`, see `stack_states`). Batches
  have a leading axis of this process's experts, see `StackedStream`.

  Attributes:
    outer: what merges the experts while they train, or None.
  """

  lead = ('branch',)

  def __init__(
    self,
    model: nn.Module | models.ModelFamily,
    optimizer: Any,
    *,
    experts: Sequence[str],
    batched: bool | None = None,
    outer: outer_lib.Outer | None = None,
    **settings: Any,
  ):
    """Says what is trained, how and where.

    Args:
      model: see `Trainer`.
      optimizer: of one model.
      experts: their names.
      batched: see `map_experts`.
      outer: merges the experts while they train, see `outer`; by default they
        never meet.
      **settings: as for `Trainer`; the mesh has an axis `branch`.

    Raises:
      ConfigError: the experts do not divide over the branches of the mesh;
        `outer` is something else.
    """
    outer = outer_lib.checked(outer)
    if outer is not None:
      others = settings.get('transforms', ())
      settings['transforms'] = (*others, outer.transform())
    super().__init__(model, optimizer, **settings)
    self.experts = list(experts)
    self.outer = outer
    self._batched = batched
    check_experts(len(self.experts), self.mesh)

  def init(self, step, layout, key, params=None, state=None):
    if not isinstance(state, Sequence):
      if state is not None and self.outer is not None:
        state = self.outer.begun(state)
      return super().init(step, layout, key, params, state)
    if self.outer is not None:
      raise errors.ConfigError(
        'Experts that are merged while they train begin as one model: give one '
        'state, or no outer merge.'
      )
    if len(state) != len(self.experts or ()):
      raise errors.ConfigError(
        f'{len(self.experts or ())} experts were given {len(state)} states.'
      )
    for one in state:
      self._check_state(step, one)
    return self._put(stack_states(state), layout, alias=False)

  def expand(self, state):
    return branch_state(state, len(self.experts or ()))

  def compile(self, step, layout):
    compiled = super().compile(step, layout)
    if self.outer is None:
      return compiled
    merge = outer_lib.merger(self.outer, layout, self.mesh)
    return outer_lib.MergingStep(compiled, merge, self.outer.every)

  def map(self, fn):
    return map_experts(fn, self.mesh, batched=self._batched)

  def placer(self, source='the data', local_rows=False):
    del local_rows  # every process reads its experts whole
    check = self._checker(source)
    return lambda batch: place_batch(self.mesh, self.rules, check(batch))


def place_batch(
  mesh: jax.sharding.Mesh,
  rules: partition.ShardingRules,
  batch: Mapping[str, np.ndarray],
) -> dict[str, jax.Array]:
  """Puts a stacked batch on the mesh: experts on `branch`, rows on `data`.

  Args:
    mesh: from `partition.make_mesh`.
    rules: their `activations` are used.
    batch: `[experts of this process, rows, ...]`, see `local_experts`; each
      expert with all its rows.

  Raises:
    DataError: rows of an expert that do not divide over the mesh.
  """
  mine = batches.local_slices(mesh, 'branch')
  placed = {}
  for name, leaf in batch.items():
    batches.check_rows(f'{name} of an expert', leaf.shape[1], mesh, rules)
    per_branch = leaf.shape[0] // len(mine)
    shape = (per_branch * mesh.shape['branch'], *leaf.shape[1:])
    offset = mine[0] * per_branch
    axes = ('branch', 'batch') + (None,) * (leaf.ndim - 2)
    target = partition.sharding(mesh, axes, shape, rules.activations)

    def part(index, leaf=leaf, offset=offset, size=shape[0]):
      start, stop, _ = index[0].indices(size)
      return leaf[(slice(start - offset, stop - offset), *index[1:])]

    placed[name] = jax.make_array_from_callback(shape, target, part)
  return placed


def local_experts(mesh: jax.sharding.Mesh, experts: int) -> list[int]:
  """The experts whose data this process must read."""
  check_experts(experts, mesh)
  per_branch = experts // mesh.shape['branch']
  return [
    branch * per_branch + i
    for branch in batches.local_slices(mesh, 'branch')
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
