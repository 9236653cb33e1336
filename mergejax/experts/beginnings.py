# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The training state that a new expert of a forest begins with.

Its parameters are one expert's, or an average of several. The released scripts
go on with the seed's moments and learning rate. So does this: a branch stands
in the schedule where the seed stopped, whichever experts it began as, so that
all experts of a forest have the same steps. Moments of several parents are
averaged as their parameters are: those of Adam and Adafactor are means of
gradients and of their squares, and a weighted mean of them is one too.
"""

from collections.abc import Mapping
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import tree
from mergejax.core import typing
from mergejax.experts import averages
from mergejax.experts import forest as forest_lib
from mergejax.merging import in_memory
from mergejax.methods import mean
from mergejax.training import checkpoints
from mergejax.training import state as state_lib
from mergejax.training import trainer as trainer_lib

_COUNT = 'count'


def begin(
  forest: forest_lib.Forest,
  shares: Mapping[str, float],
  trainer: trainer_lib.Trainer,
  *,
  steps: int,
  key: jax.Array,
  reset_optimizer: bool = False,
  reset_schedule: bool = False,
  method: str = 'linear',
  **options: Any,
) -> state_lib.TrainState:
  """A state of one model, in host memory.

  Args:
    forest: where the parents are.
    shares: `{expert or 'seed': weight}`, from `averages.weights`.
    trainer: of the run; it knows the optimizer.
    steps: the step number that the run reaches, `position` and what it makes.
    key: of the expert.
    reset_optimizer: fresh moments. So they are too if a parent has none, which
      is told.
    reset_schedule: the learning rate begins anew; else where the seed stopped.
    method: of the average of the parameters.
    **options: of the method.

  Raises:
    UserError: moments of another optimizer; see `averages.average`.
  """
  params = averages.average(forest, shares, method, **options)
  fresh: Any = trainer.begin(steps, params, key)
  stored = [forest.state(name) for name in shares]
  moments = fresh.opt_state
  if not reset_optimizer:
    missing = [name for name, one in zip(shares, stored) if one is None]
    if missing:
      logging.warning(
        'The moments of the optimizer begin anew: %s of %s has none.',
        ', '.join(missing), forest.path,
      )  # fmt: skip
    else:
      found = [
        checkpoints.continued(one, fresh).opt_state
        for one in stored
        if one is not None
      ]
      moments = _averaged(found, list(shares.values()))
  at = position(forest, reset_schedule)
  state = fresh.replace(
    step=np.int32(at), opt_state=at_step(moments, at), key=fresh.key
  )
  return jax.tree.map(np.asarray, state)


def position(forest: forest_lib.Forest, reset_schedule: bool = False) -> int:
  """The step number at which branches begin: 0, or the seed's."""
  return 0 if reset_schedule else int(forest.seed['steps'])


def kept(state: state_lib.TrainState) -> dict[str, Any]:
  """What a forest keeps of a state beside the parameters: moments and step."""
  return {'opt_state': state.opt_state, 'step': np.int32(state.step)}


def _averaged(found, weights):
  """The weighted mean of moments; of one parent, they themselves."""
  if len(found) == 1:
    return found[0]
  flat = [tree.flatten(one) for one in found]
  # Counts are those of the parent that weighs most.
  heaviest = flat[int(np.argmax(weights))]
  wide = {
    path: leaf
    for path, leaf in heaviest.items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  merged = tree.flatten(
    in_memory.merge(
      [{path: one[path] for path in wide} for one in flat],
      mean.linear(),
      weights=weights,
    )
  )
  return tree.map_paths(lambda path, _: {**heaviest, **merged}[path], found[0])


def at_step(opt_state: typing.Tree, step: int) -> typing.Tree:
  """The state of an optimizer whose schedules stand at a step.

  A count that stands alone is a schedule's; one beside moments says how many
  gradients are in them.
  """
  paths = list(tree.flatten(opt_state))
  alone = {
    path
    for path in paths
    if path.rpartition('/')[2] == _COUNT
    and not any(
      other != path and other.startswith(path.removesuffix(_COUNT))
      for other in paths
    )
  }
  return tree.map_paths(
    # Of a stack, of experts for one, each slice counts for itself.
    lambda path, leaf: (
      np.full(leaf.shape, step, leaf.dtype) if path in alone else leaf
    ),
    opt_state,
  )
