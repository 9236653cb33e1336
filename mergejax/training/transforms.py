# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a step does besides its update: averages, and steps that are skipped.

A step transform is a pure pair, as an optax transformation is, with a state of
its own in `TrainState.extras`. Transforms run one after the other, averages of
the parameters last; each sees what the one before made of the new state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import identity
from mergejax.core import numerics
from mergejax.core import tree
from mergejax.core import typing
from mergejax.methods import base as methods
from mergejax.methods import mean
from mergejax.training import state as state_lib

Metrics = Mapping[str, jax.Array]


class StepTransform(NamedTuple):
  """Something that a step does after its update.

  Attributes:
    name: of its state in `TrainState.extras`.
    init: `(params) -> extra`; traceable.
    update: `(extra, old state, new state, metrics) -> (extra, new state,
      metrics)`; traceable. The states have no extras that may be relied on.
    check: `(step, metrics in host memory)`, called where metrics are logged
      and before a state is saved; it may raise to end the run there.
    averaged: `(extra, params) -> params` to evaluate beside the live ones;
      None if there are none.
    settings: plain data; two transforms with the same make the same numbers.
  """

  name: str
  init: Callable[[typing.Tree], Any]
  update: Callable[..., tuple[Any, state_lib.TrainState, Metrics]]
  check: Callable[[int, Mapping[str, np.ndarray]], None] | None = None
  averaged: Callable[[Any, typing.Tree], typing.Tree] | None = None
  settings: Mapping[str, Any] = {}


def ema(decay: float, *, name: str = 'ema') -> StepTransform:
  """An exponential moving average of the parameters.

  `sum_i d^(n-i) theta_i / sum_i d^(n-i)` over the states after every step: the
  mean that `mj.merge(states, 'linear', weights=[d^(n-1), ..., d, 1])` gives,
  valid from the first step on.

  Args:
    decay: d; 0.999 looks back over about a thousand steps.
    name: of its state.

  Source: Polyak and Juditsky (1992); the division is Adam's bias correction.
  """
  _check_decay(decay)
  return running(mean.linear(), decay=decay, name=name)


def lawa(every: int, window: int, *, name: str = 'lawa') -> StepTransform:
  """The mean of the newest parameters, taken every so many steps.

  Args:
    every: steps between two states that are averaged.
    window: how many of them; it holds as many copies of the parameters.
    name: of its state.

  Source: Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT
  training with latest weight averaging" (2022),
  https://arxiv.org/abs/2209.14981.
  """
  return running(mean.linear(), every=every, window=window, name=name)


def polynomial(
  eta: float = 8.0, *, every: int = 1, name: str = 'polynomial'
) -> StepTransform:
  """An average whose old states lose their weight as a power of time.

  `avg_t = (1 - a_t) avg_{t-1} + a_t theta_t`, `a_t = (eta + 1) / (t + eta)`: the
  weight of state t grows as `t^eta`. It needs no horizon: at any step it looks
  back over a share of about `1 / (eta + 1)` of the run.

  Args:
    eta: 0 is the uniform average of all states; 8 is usual for deep networks.
    every: steps between two states that are averaged.
    name: of its state.

  Source: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
  Optimization" (2013), https://arxiv.org/abs/1212.1824: polynomial-decay
  averaging.
  """
  errors.check_number('eta', eta, 0)
  kept = lambda count: 1 - (eta + 1) / (count + 1 + eta)
  return _told(
    running(mean.linear(), every=every, decay=kept, name=name), eta=eta
  )


def one_minus_sqrt(
  *, start: int = 0, every: int = 1, name: str = 'one_minus_sqrt'
) -> StepTransform:
  """The model that a learning rate decayed by `1 - sqrt` would have reached.

  To first order a decay `w_1 > w_2 > ...` of the updates `theta_j -
  theta_{j-1}` is the mean of the states with the weights `w_j - w_{j+1}`. Of
  `w_j = 1 - sqrt(j / n)` these are `sqrt(j + 1) - sqrt(j)`, over `sqrt(n)`,
  whatever n is: at any step the average is that of a decay which began at
  `start` and ends now.

  Args:
    start: the step from which on states count; the learning rate is best
      constant from there.
    every: steps between two states that are averaged.
    name: of its state.

  Source: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint
  Merging" (2025), https://arxiv.org/abs/2507.17634; the decay is that of Haegele
  et al. (2024), https://arxiv.org/abs/2405.18392.
  """
  kept = lambda count: jnp.sqrt(count / (count + 1))
  return _told(
    running(mean.linear(), every=every, start=start, decay=kept, name=name),
    decay='1 - sqrt',
  )


def running(
  merge: methods.Merge,
  *,
  every: int = 1,
  start: int = 0,
  decay: float | Callable[[jax.Array], Any] | None = None,
  window: int | None = None,
  name: str = 'merge',
) -> StepTransform:
  """A merge of the states that a run goes through, kept while it runs.

  Args:
    merge: an additive method without first passes or a base, such as
      `mj.linear()`.
    every: steps between two states that are merged.
    start: the step from which on states are merged.
    decay: what is there already is multiplied by it, and the new state has the
      weight `1 - decay`; a number, or a function of how many states are there
      (`<float32>[]`). By default all weigh 1.
    window: merge the newest so many alone, which then weigh the same. It keeps
      a state of the method for each, and adds them up where the result is
      asked for.
    name: of its state.

  Returns:
    A transform whose `averaged` is the merge so far; the live parameters
    before the first.

  Raises:
    ConfigError: a method that must see all models at once, numbers that are
      none, or both `decay` and `window`.
  """
  _check_merge(merge)
  _check_numbers(every, decay, window)
  errors.check_whole('start', start, least=0)

  def init(params):
    zeros = merge.init(tree.specs(_floating(params)))
    if window is not None:
      zeros = jax.tree.map(
        lambda x: jnp.zeros((window, *x.shape), x.dtype), zeros
      )
    return {'taken': jnp.zeros((), jnp.int32), 'state': tree.unflatten(zeros)}

  def take(extra, params):
    before = _by_path(extra['state'], list(params))
    if window is not None:
      fresh = merge.update(merge.init(tree.specs(params)), params, weight=1.0)
      slot = extra['taken'] % window
      after = jax.tree.map(
        lambda ring, new: ring.at[slot].set(new), before, fresh
      )
    elif decay is not None:
      kept = decay
      if callable(decay):
        kept = jnp.asarray(decay(extra['taken'].astype(jnp.float32)))
      faded = jax.tree.map(lambda x: jnp.asarray(kept, x.dtype) * x, before)
      after = merge.update(faded, params, weight=1.0 - kept)
    else:
      after = merge.update(before, params, weight=1.0)
    return {'taken': extra['taken'] + 1, 'state': tree.unflatten(after)}

  def update(extra, old, new, metrics):
    del old
    params = _wide(_floating(new.params))
    if every == 1 and not start:
      return take(extra, params), new, metrics
    due = (new.step % every == 0) & (new.step >= start)
    extra = jax.lax.cond(due, take, lambda extra, params: extra, extra, params)
    return extra, new, metrics

  def averaged(extra, params):
    leaves = _floating(params)
    states = _by_path(extra['state'], list(leaves))
    if window is not None:
      # Slots that were never filled hold zeros, which add nothing.
      states = jax.tree.map(lambda ring: jnp.sum(ring, axis=0), states)
    merged = jax.jit(merge.finish)(states)
    any_taken = extra['taken'] > 0
    return tree.map_paths(
      lambda path, leaf: (
        jnp.where(any_taken, merged[path].astype(leaf.dtype), leaf)
        if path in merged
        else leaf
      ),
      params,
    )

  settings: dict[str, Any] = {'every': every, 'decay': decay, 'window': window}
  if callable(decay):
    settings['decay'] = identity.told(decay)
  if identity.told(merge) != identity.told(mean.linear()):
    settings['merge'] = identity.told(merge)
  if start:
    settings['start'] = start
  return StepTransform(name, init, update, None, averaged, settings)


def skip_nonfinite(
  stop_after: int = 10, *, name: str = 'skipped'
) -> StepTransform:
  """Steps whose loss or gradient is not finite change no parameter.

  They move the step number, and are counted in the metric `skipped`. Transforms
  behind it, and all averages, see the state that was kept.

  Args:
    stop_after: end the run once so many steps were skipped. A batch now and
      then is the data; ten of them are the learning rate or a fault.
    name: of its state and of its metric.

  Raises:
    ConfigError: in training, when the run ends; what was saved stays.
  """
  errors.check_whole('stop_after', stop_after)

  def update(extra, old, new, metrics):
    fine = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['grad_norm'])
    new = state_lib.where(fine, new, old)
    extra = extra + jnp.where(fine, 0, 1).astype(jnp.int32)
    return extra, new, {**metrics, name: extra}

  def check(step, metrics):
    found = np.asarray(metrics[name])
    if found.max(initial=0) >= stop_after:
      raise errors.ConfigError(
        f'{int(found.max())} steps up to step {step} had a loss or a gradient '
        'that is not finite, and were skipped; the run ends here '
        f'(skip_nonfinite(stop_after={stop_after})). The newest checkpoint is '
        'good. Lower the learning rate, clip the gradient (clip=1.0), look at '
        'the data around that step, or raise stop_after.'
      )

  # No settings: when a run ends says nothing of its numbers, and the message
  # above tells to raise it.
  return StepTransform(
    name, lambda params: jnp.zeros((), jnp.int32), update, check
  )


def task_metrics(tasks: Sequence[str], *, name: str = 'tasks') -> StepTransform:
  """Losses and counts by task, as metrics; the update stays as it is.

  For an objective that has `objective.by_task` as the metric `tasks`, such as
  `cross_entropy(tasks=len(tasks))`. Of every task it logs `loss/TASK`, nats per
  target in the newest batch with one (0 before the first), and
  `examples/TASK`, how many examples have been drawn since the run began: what
  a mixture really gave.

  Args:
    tasks: names in the order of their numbers, `task_ids.names(mixture)`.
    name: of its state.

  Raises:
    ConfigError: no tasks.
  """
  if not tasks:
    raise errors.ConfigError('task_metrics needs the names of the tasks.')
  count = len(tasks)

  def init(params):
    del params
    return {
      'examples': jnp.zeros((count,), jnp.uint32),
      'loss': jnp.zeros((count,), jnp.float32),
    }

  def update(extra, old, new, metrics):
    del old
    metrics = dict(metrics)
    if not {'tasks', 'tokens'} <= metrics.keys():
      raise errors.ConfigError(
        'task_metrics needs an objective that tells tasks apart: '
        f'cross_entropy(tasks={count}), or one of your own with the metrics '
        "`tasks` (objective.by_task) and `tokens`, the sum of a batch's "
        'weights.'
      )
    loss, weight, examples = metrics.pop('tasks')
    drawn = jnp.round(examples * metrics['tokens']).astype(jnp.uint32)
    mean = loss / jnp.where(weight > 0, weight, 1.0)
    fresh = (weight > 0) & jnp.isfinite(mean)
    extra = {
      'examples': extra['examples'] + drawn,
      'loss': jnp.where(fresh, mean, extra['loss']),
    }
    for number, task in enumerate(tasks):
      metrics[f'loss/{task}'] = extra['loss'][number]
      metrics[f'examples/{task}'] = extra['examples'][number]
    return extra, new, metrics

  settings = {'tasks': list(tasks)}
  return StepTransform(name, init, update, settings=settings)


def _check_numbers(every, decay, window):
  errors.check_whole('every', every)
  if window is not None:
    errors.check_whole('window', window)
  if decay is not None and not callable(decay):
    _check_decay(decay)
  if window is not None and decay is not None:
    raise errors.ConfigError(
      f'decay={decay} and window={window} are two ways to forget: the states '
      'of a window all weigh the same. Leave one of them out.'
    )


def _told(transform, **settings):
  """A transform that says of itself what it was made of."""
  return transform._replace(settings={**transform.settings, **settings})


def _check_decay(decay):
  if not 0 <= decay < 1:
    raise errors.ConfigError(
      f'decay must be a number from 0 to below 1, not {decay!r}.'
    )


def _check_merge(merge):
  lacking = [
    what
    for what, there in (
      ('looks at all models first', bool(merge.first_passes)),
      ('must see all models at once', not merge.additive),
      ('needs statistics', bool(merge.needs)),
      ('needs a base', merge.base == 'required'),
      ('lays leaves out by their axes', merge.view != 'element'),
    )
    if there
  ]
  if lacking:
    raise errors.ConfigError(
      f'A method that {lacking[0]} cannot run beside training: take an additive '
      'one, such as mj.linear().'
    )


def _floating(params):
  """`{path: leaf}` of the leaves that a merge may change."""
  return {
    path: leaf
    for path, leaf in tree.flatten(params).items()
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }


def _wide(leaves):
  """Leaves in the dtype that merges accumulate in."""
  return {path: numerics.widen(leaf) for path, leaf in leaves.items()}


def _by_path(nested, paths):
  """The inverse of `tree.unflatten`, for leaves that are states of a method."""
  found = {}
  for path in paths:
    node = nested
    for part in path.split('/'):
      node = node[part]
    found[path] = node
  return found
