# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts that are merged while they train: local SGD, DiLoCo, any merge.

Every H steps the K experts that train side by side become one model, and go on
from it, each with its own moments:

    merged   = merge(theta_1, ..., theta_K)
    gradient = anchor - merged
    anchor  <- anchor + outer update(gradient);  theta_k <- anchor

With an outer SGD of learning rate 1 the anchor is the merge itself: local SGD.
DiLoCo takes Nesterov's momentum. The step between merges is the ordinary one,
in which nothing crosses `branch`; the merge is a program of its own, of one
all-reduce over `branch` as large as the parameters. Nothing leaves the devices.

Source: Stich, "Local SGD Converges Fast and Communicates Little" (2019),
https://arxiv.org/abs/1805.09767; Douillard et al., "DiLoCo" (2023),
https://arxiv.org/abs/2311.08105.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mergejax.core import errors
from mergejax.core import identity
from mergejax.core import tree
from mergejax.core import typing
from mergejax.merging import on_mesh
from mergejax.methods import base as methods
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import transforms

NAME = 'outer'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
  """A merge of the experts of a `BranchTrainer`, every so many steps.

  Attributes:
    every: H, steps of each expert between two merges; the number of steps of a
      run merges them once, at its end.
    optimizer: what is made of the difference to the last merge.
    method: how experts become one; None: their mean, in one reduction. Others
      have the last merge for a base, and see the experts one beside the other.
    importance: `(state of one expert) -> tree like its parameters`, weights of
      a mean number by number: `sum_k F_k theta_k / sum_k F_k`, in one reduction
      of twice the parameters. See `adam_fisher`.

  Raises:
    ConfigError: `every` is no number of steps, both a method and an importance,
      or a method that needs statistics.
  """

  every: int
  optimizer: optax.GradientTransformation = optax.sgd(1.0)
  method: methods.Merge | None = None
  importance: Callable[[Any], typing.Tree] | None = None

  def __post_init__(self):
    errors.check_whole('every', self.every)
    if self.method is None:
      return
    if self.importance is not None:
      raise errors.ConfigError(
        'An importance makes a weighted mean: give no method beside it.'
      )
    if self.method.statistics:
      raise errors.ConfigError(
        f'A merge that needs a {self.method.statistics[0].name} cannot collect '
        'it in a step: give an importance, such as outer.adam_fisher.'
      )

  def transform(self) -> transforms.StepTransform:
    """Keeps the last merge, and the outer optimizer's state, with the run."""

    def init(params):
      anchor = jax.tree.map(jnp.asarray, params)
      return {'anchor': anchor, 'opt_state': self.optimizer.init(params)}

    settings = {
      'every': self.every,
      'optimizer': optim.describe(self.optimizer),
      'mean': self.method is None and self.importance is None,
    }
    if settings['optimizer'] == optim.UNKNOWN:
      settings['optimizer'] = identity.told(self.optimizer)
    for what in ('method', 'importance'):
      if getattr(self, what) is not None:
        settings[what] = identity.told(getattr(self, what))
    return transforms.StepTransform(
      NAME,
      init,
      lambda extra, old, new, metrics: (extra, new, metrics),
      settings=settings,
    )

  def check_meets(self, begins: int, ends: int) -> None:
    """Raises a `ConfigError` for a run in which no step merges the experts.

    Args:
      begins: the number of the step after which they branch.
      ends: of the last one.
    """
    if begins // self.every == ends // self.every:
      raise errors.ConfigError(
        f'Experts that are merged every {self.every} steps never meet between '
        f'steps {begins} and {ends}: lower every (EVERY of the gin file), or '
        'train longer.'
      )

  def begun(self, state: Any) -> state_lib.TrainState:
    """A state of one model without outer merges, as their beginning."""
    if NAME in state.extras:
      return state
    extra = self.transform().init(state.params)
    return state.replace(extras={**state.extras, NAME: extra})


def checked(outer: Any) -> Outer | None:
  """What a run was given as its outer merge.

  Raises:
    ConfigError: it is neither one nor None.
  """
  if outer is None or isinstance(outer, Outer):
    return outer
  raise errors.ConfigError(
    'outer= is what merges the experts while they train, such as '
    f'outer.diloco(every=100), not {outer!r}.'
  )


def local_sgd(every: int) -> Outer:
  """The mean of the experts, every so many steps.

  Args:
    every: H.
  """
  return Outer(every=every)


def diloco(
  every: int, *, learning_rate: float = 0.7, momentum: float = 0.9
) -> Outer:
  """DiLoCo: an outer SGD with Nesterov's momentum.

  Args:
    every: H; 500 in the paper.
    learning_rate: of the outer step, 0.7 in the paper.
    momentum: likewise 0.9.

  Source: Douillard et al., "DiLoCo" (2023), https://arxiv.org/abs/2311.08105,
  algorithm 1.
  """
  nesterov = optax.sgd(learning_rate, momentum=momentum, nesterov=True)
  made = optim.Optimizer(nesterov.init, nesterov.update)
  made.settings = {
    'optimizer': 'nesterov', 'learning_rate': learning_rate,
    'momentum': momentum,
  }  # fmt: skip
  return Outer(every=every, optimizer=made)


def adam_fisher(state: state_lib.TrainState) -> typing.Tree:
  """Adam's second moments: means of squared gradients, a diagonal Fisher.

  The gradients are those of batches, not of examples, so it is a rough one; a
  small number keeps what has never had a gradient as the mean.

  Raises:
    ConfigError: the optimizer keeps no second moment of every parameter.
  """
  found = optax.tree.get(state.opt_state, 'nu')
  if found is None:
    raise errors.ConfigError(
      'This optimizer keeps no second moments `nu` of every parameter: train '
      'with optim.adamw, or give an importance of your own.'
    )
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) + 1e-12, found)


def merger(
  outer: Outer, layout: state_lib.TrainState, mesh: jax.sharding.Mesh
) -> Callable[[state_lib.TrainState], state_lib.TrainState]:
  """The merge as a compiled program; it overwrites the state it is given.

  Args:
    outer: what is done.
    layout: shardings of the stacked state, from `BranchTrainer.layout`.
    mesh: of the run.
  """

  def merge(state):
    extra = state.extras[NAME]
    merged = _merged(outer, state, extra['anchor'], layout.params, mesh)

    def step(anchor, opt_state, merged):
      gradient = jax.tree.map(
        lambda a, m: (_wide(a) - _wide(m)).astype(a.dtype), anchor, merged
      )
      updates, opt_state = outer.optimizer.update(gradient, opt_state, anchor)
      return optax.apply_updates(anchor, updates), opt_state

    anchor, opt_state = jax.vmap(step)(
      extra['anchor'], extra['opt_state'], merged
    )
    extra = {'anchor': anchor, 'opt_state': opt_state}
    # Two outputs may not share a buffer that the next step overwrites.
    params = jax.tree.map(jnp.copy, anchor)
    return state.replace(params=params, extras={**state.extras, NAME: extra})

  return jax.jit(merge, donate_argnums=(0,), out_shardings=layout)


class MergingStep:
  """A compiled step after every H-th of which the experts are merged.

  The number of the step is read from the first state alone: waiting for it
  would stop the device.
  """

  def __init__(self, step: Any, merge: Any, every: int):
    self.ordinary, self.merge, self._every = step, merge, every
    self._at: int | None = None

  def __call__(self, state, batch):
    if self._at is None:
      self._at = state_lib.step_number(state)
    state, metrics = self.ordinary(state, batch)
    self._at += 1
    if self._at % self._every == 0:
      state = self.merge(state)
    return state, metrics

  def lower(self, *args: Any, **named: Any) -> Any:
    """Of the ordinary step."""
    return self.ordinary.lower(*args, **named)


def _merged(outer, state, anchor, layout, mesh):
  """The merge, with a leading axis K of equal numbers, in float32."""
  if outer.method is not None:
    one = on_mesh.merge_experts(
      state.params, outer.method, base=jax.tree.map(lambda x: x[0], anchor)
    )
    return jax.tree.map(
      lambda leaf, like: jnp.broadcast_to(leaf, like.shape), one, state.params
    )
  importance = None
  if outer.importance is not None:
    importance = jax.vmap(outer.importance)(state)
    tree.check_same(
      tree.specs(state.params), tree.specs(importance),
      expected_name='the parameters', given_name='their importance',
    )  # fmt: skip
  return mean_over_experts(state.params, layout, mesh, importance)


def mean_over_experts(
  stacked: typing.Tree,
  layout: typing.Tree,
  mesh: jax.sharding.Mesh,
  importance: typing.Tree | None = None,
) -> typing.Tree:
  """The mean of stacked experts, given back to each, by one all-reduce.

  `sum_k theta_k / K`, or `sum_k F_k theta_k / sum_k F_k`; the sum is in
  float32, over the experts of a device and then over `branch`, of all leaves in
  one vector. No device sees more of a leaf than its own part.

  Args:
    stacked: leaves `[K, ...]`.
    layout: their shardings, the first axis on `branch`.
    mesh: likewise.
    importance: F, leaves `<float>[K, ...]` laid out likewise.

  Returns:
    Leaves `<float32>[K, ...]`; those that are not floating as they are.
  """
  leaves, places = tree.flatten(stacked), tree.flatten(layout)
  floating = {
    path: leaf
    for path, leaf in leaves.items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }
  specs = {path: places[path].spec for path in floating}
  given = [floating]
  if importance is not None:
    flat = tree.flatten(importance)
    given.append({path: flat[path] for path in floating})
  reduced = jax.shard_map(
    _reduce,
    mesh=mesh,
    in_specs=tuple(specs for _ in given),
    out_specs=specs,
    check_vma=False,
  )(*given)
  return tree.map_paths(lambda path, leaf: reduced.get(path, leaf), stacked)


def _reduce(
  own: Mapping[str, jax.Array],
  importance: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """The parts of a device: summed, reduced over `branch`, given back."""
  shapes = {path: leaf.shape for path, leaf in own.items()}
  count = next(iter(shapes.values()))[0]
  wide = {path: _wide(leaf) for path, leaf in own.items()}
  if importance is None:
    parts = [jnp.sum(leaf, axis=0) for leaf in wide.values()]
  else:
    share = {path: _wide(leaf) for path, leaf in importance.items()}
    parts = [jnp.sum(share[p] * leaf, axis=0) for p, leaf in wide.items()]
    parts += [jnp.sum(share[p], axis=0) for p in wide]
  total = jax.lax.psum(
    jnp.concatenate([part.reshape(-1) for part in parts]), 'branch'
  )
  if importance is None:
    mean = total / (count * jax.lax.axis_size('branch'))
  else:
    above, below = jnp.split(total, 2)
    mean = above / below
  found, at = {}, 0
  for path, shape in shapes.items():
    size = math.prod(shape[1:])
    one = mean[at : at + size].reshape(shape[1:])
    found[path] = jnp.broadcast_to(one, shape)
    at += size
  return found


_wide = functools.partial(jnp.asarray, dtype=jnp.float32)
