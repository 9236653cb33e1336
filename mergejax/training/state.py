# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: the training state, and how it lies on a mesh."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import partition
from mergejax.core import axes as axes_lib
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import slices


@flax.struct.dataclass
class TrainState:
  """All that a run must keep to continue.

  Attributes:
    step: `<int32>[]` updates made so far.
    params: the parameters.
    opt_state: the optimizer's state.
    key: the random key of the run; a step folds its number into it.
    extras: `{name: pytree}` of the step transforms: running averages, counts.
  """

  step: jax.Array
  params: typing.Tree
  opt_state: Any
  key: jax.Array
  extras: Mapping[str, Any] = flax.struct.field(default_factory=dict)


def step_number(state: TrainState) -> int:
  """Updates made so far; experts trained side by side have made the same."""
  step = state.step
  if isinstance(step, jax.Array):  # maybe spread over processes
    step = step.addressable_shards[0].data
  return int(np.asarray(step).reshape(-1)[0])


def where(kept: jax.Array, new: TrainState, old: TrainState) -> TrainState:
  """The new state, but with the old parameters and moments unless `kept`.

  Args:
    kept: `<bool>[]`.
    new: a state; its step number and the rest stay.
    old: the one before.
  """
  choose = lambda after, before: jnp.where(kept, after, before)
  return new.replace(
    params=jax.tree.map(choose, new.params, old.params),
    opt_state=jax.tree.map(choose, new.opt_state, old.opt_state),
  )


def logical_axes(
  state: Any, specs: typing.SpecTree
) -> dict[typing.Path, tuple[str | None, ...]]:
  """Logical axes of every leaf of a state that follows a parameter.

  A leaf follows the parameter whose path is part of its own: moments and
  averages have that path in their trees. One of the parameter's shape has its
  axes. A factored moment, as Adafactor's rows and columns, has those that are
  left when one is summed over. Axes in front, such as those of a window of
  averages, are not spread; what `slices` keeps of stacks has those in front.

  Args:
    state: a state of arrays or of shapes, of one model.
    specs: its parameters, with axes.

  Returns:
    `{path: axes}`; what follows no parameter is left out.
  """
  found = {}
  for path, leaf in tree.flatten(state).items():
    parameter = parameter_of(path, specs)
    if parameter is None:
      continue
    axes = _following(path, tuple(leaf.shape), specs[parameter])
    if axes is not None:
      found[path] = axes
  return found


def parameter_of(
  path: typing.Path, specs: Mapping[typing.Path, Any]
) -> typing.Path | None:
  """The longest path of a parameter that is a part of a leaf's path."""
  parts = path.split('/')
  count = len(parts)
  for length in range(count, 0, -1):
    for start in range(count - length, -1, -1):
      name = '/'.join(parts[start : start + length])
      if name in specs:
        return name
  return None


def _following(path, shape, spec):
  """Axes of a leaf of the given shape that follows a parameter; maybe None."""
  if spec.axes is None:
    return None
  if slices.STACKED in path.split('/'):
    stack = axes_lib.stacked(spec)
    order = [*stack, *(i for i in range(len(spec.shape)) if i not in stack)]
    spec = typing.LeafSpec(
      tuple(spec.shape[i] for i in order),
      spec.dtype,
      tuple(spec.axes[i] for i in order),
    )
  rank = len(spec.shape)
  lead = len(shape) - rank
  if lead >= 0 and shape[lead:] == spec.shape:
    return (None,) * lead + tuple(spec.axes)
  # Of a square matrix either side may be gone: Adafactor's names tell which.
  order = range(rank) if 'v_col' in path.split('/') else range(rank)[::-1]
  for gone in order:
    rest = [i for i in range(rank) if i != gone]
    if rest and shape == tuple(spec.shape[i] for i in rest):
      return tuple(spec.axes[i] for i in rest)
  return None


def shardings(
  state: Any,
  specs: typing.SpecTree,
  mesh: jax.sharding.Mesh,
  rules: partition.ShardingRules,
  *,
  lead: tuple[str, ...] = (),
) -> Any:
  """Shardings of a training state: parameters and what follows them.

  Args:
    state: a `TrainState` of arrays or shapes, without the axes of `lead`.
    specs: of its parameters, with logical axes where they are known.
    mesh: from `partition.make_mesh`.
    rules: what goes where.
    lead: logical axes in front of every leaf: `('branch',)` for experts.

  Returns:
    A tree of shardings. What follows no parameter is replicated (over all but
    `lead`).
  """
  known = logical_axes(state, specs)
  axes = {
    path: (*lead, *known.get(path, (None,) * len(leaf.shape)))
    for path, leaf in tree.flatten(state).items()
  }
  # An axis in front divides by what the caller checked: 0 is divisible by all.
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (0,) * len(lead) + leaf.shape, leaf.dtype
    ),
    state,
  )
  return partition.shardings(mesh, shapes, axes, rules)
