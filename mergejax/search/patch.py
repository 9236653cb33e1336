# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""PAINT: patching a model by interpolation, one task or several."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.evaluation import base as evaluation
from mergejax.merging import in_memory
from mergejax.methods import arithmetic
from mergejax.methods import mean
from mergejax.search import base
from mergejax.search import evolve
from mergejax.search import grid

ALPHAS = tuple(np.linspace(0.0, 1.0, 11).tolist())


@dataclasses.dataclass(frozen=True)
class Patch:
  """A patched model.

  Attributes:
    params: the model.
    alphas: the coefficient of each fine-tuned model.
    log: everything that was tried.
  """

  params: typing.Tree
  alphas: tuple[float, ...]
  log: base.Log


def objective(
  supported: Sequence[str],
  patching: Sequence[str],
  *,
  most_lost: float | None = None,
  before: Mapping[str, float] | None = None,
) -> Callable[[evaluation.Scores], float]:
  """What patching maximises.

  Args:
    supported: tasks the model is to keep.
    patching: tasks it is to learn.
    most_lost: instead of the mean of both groups' means, maximise the patching
      tasks among models whose supported mean falls by no more than this.
    before: scores of the unpatched model, for `most_lost`.

  Returns:
    `scores -> number`.

  Raises:
    UserError: no patching task, or `most_lost` without `before`.
  """
  if not patching:
    raise errors.ConfigError('Patching needs at least one task to be learned.')
  if not supported:
    logging.warning(
      'No supported task is given, so nothing speaks against alpha = 1.'
    )
  if most_lost is not None and before is None:
    raise errors.ConfigError('`most_lost` needs the scores `before` patching.')
  both = set(supported) & set(patching)
  if both:
    raise errors.ConfigError(
      f'{sorted(both)} cannot be both supported and patching tasks.'
    )

  def group(scores, names):
    for name in names:
      if name not in scores:
        raise errors.ConfigError(errors.near(name, scores, 'task'))
    return float(np.mean([float(scores[name]) for name in names]))

  def of(scores):
    gained = group(scores, patching)
    if not supported:
      return gained
    kept = group(scores, supported)
    if most_lost is None:
      return (kept + gained) / 2
    # A hair of tolerance: sums of scores round.
    lost = group(before, supported) - kept
    return gained if lost <= most_lost + 1e-9 else -np.inf

  return of


def single(
  base_model: typing.Tree,
  tuned: typing.Tree,
  evaluate: Any,
  goal: Callable[[evaluation.Scores], float],
  *,
  alphas: Sequence[float] = ALPHAS,
  allow_outside: bool = False,
  frozen: str | None = None,
  log: base.Log | None = None,
) -> Patch:
  """Chooses alpha of `(1 - alpha) theta_0 + alpha theta_1` on held-out data.

  Args:
    base_model: the model to patch.
    tuned: it, fine-tuned on the patching task with its head frozen.
    evaluate: an `Evaluator` (one compiled loop) or `params -> {task: score}`.
    goal: from `objective`.
    alphas: the grid; of equal scores the smallest alpha wins.
    allow_outside: take alphas below 0 or above 1 too.
    frozen: regular expression of leaves that must not have moved (the head).
    log: where candidates are written down.

  Returns:
    The patched model; alpha 0 and 1 give exact copies.

  Raises:
    UserError: models that differ, alphas outside [0, 1], a frozen leaf that
      moved, scores that are not finite.

  Source: Ilharco et al., "Patching open-vocabulary models by interpolating
  weights" (2022), https://arxiv.org/abs/2208.05592, section 2.
  """
  alphas = sorted(float(a) for a in alphas)
  if not allow_outside and not all(0 <= a <= 1 for a in alphas):
    raise errors.ConfigError(
      f'alpha goes from 0 (the old model) to 1 (the new), not {alphas}; pass '
      'allow_outside=True if that is meant.'
    )
  if frozen is not None:
    _check_frozen(base_model, tuned, frozen)
  log = base.Log() if log is None else log
  log.maximise(goal)
  grid.grid(
    _interpolated, (base_model, tuned), evaluate, np.array(alphas)[:, None],
    log=log,
  )  # fmt: skip
  best = log.best()
  return Patch(at(base_model, tuned, best.point[0]), best.point, log)


def at(
  base_model: typing.Tree, tuned: typing.Tree, alpha: float
) -> typing.Tree:
  """The model at one alpha; exact copies at 0 and 1."""
  return in_memory.merge(
    [tuned], mean.interpolate(alpha=alpha), base=base_model
  )


def _interpolated(models, point):
  base_model, tuned = models
  return at(base_model, tuned, point[0])


def _check_frozen(base_model, tuned, pattern):
  before, after = tree_lib.flatten(base_model), tree_lib.flatten(tuned)
  frozen = tree_lib.expression(pattern, 'frozen pattern')
  held = [path for path in before if frozen.fullmatch(path)]
  if not held:
    raise errors.ConfigError(f'{pattern!r} matches no parameter to be frozen.')
  moved = [
    path
    for path in held
    if not np.array_equal(np.asarray(before[path]), np.asarray(after[path]))
  ]
  if moved:
    raise errors.StructureError(
      'These parameters should have been frozen while fine-tuning, yet they '
      f'moved:\n{errors.listed(moved)}'
    )


def joint(
  base_model: typing.Tree,
  fine_tune: Callable[[typing.Tree], typing.Tree],
  evaluate: Any,
  supported: Sequence[str],
  patching: Sequence[str],
  *,
  alphas: Sequence[float] = ALPHAS,
  frozen: str | None = None,
  log: base.Log | None = None,
) -> Patch:
  """Patches several tasks at once: one fine-tuning on all, one alpha.

  Needs the data of all tasks together; where it is there, usually the strongest
  of the three ways.

  Args:
    base_model: the model to patch.
    fine_tune: `params -> params` trains on the mixture of all patching tasks,
      each example with the frozen head of its own task.
    evaluate: as for `single`, for all supported and patching tasks.
    supported: tasks the model is to keep.
    patching: tasks to learn.
    alphas: the grid.
    frozen: see `single`.
    log: where candidates are written down.

  Returns:
    The patched model and its alpha.

  Raises:
    UserError: as `single` and `objective`.
  """
  return single(
    base_model, fine_tune(base_model), evaluate,
    objective(supported, patching), alphas=alphas, frozen=frozen, log=log,
  )  # fmt: skip


def sequential(
  base_model: typing.Tree,
  fine_tune: Callable[[typing.Tree, int], typing.Tree],
  evaluate: Callable[[typing.Tree, Sequence[str]], evaluation.Scores],
  supported: Sequence[str],
  patching: Sequence[str],
  *,
  alphas: Sequence[float] = ALPHAS,
) -> Patch:
  """Patches tasks one after the other, each from the patched model before.

  Args:
    base_model: the model to patch.
    fine_tune: `(params, i) -> params` trains on patching task i.
    evaluate: `(params, tasks) -> {task: score}`; is asked for the supported
      tasks and for the patching tasks seen so far only.
    supported: tasks the model is to keep.
    patching: tasks to learn, in order, which matters.
    alphas: the grid of every step.

  Returns:
    The model after the last step, one alpha a step, and the last step's log.
  """
  params, chosen, patch = base_model, [], None
  for i in range(len(patching)):
    seen = list(patching[: i + 1])
    patch = single(
      params,
      fine_tune(params, i),
      lambda p, seen=seen: evaluate(p, [*supported, *seen]),
      objective(supported, seen),
      alphas=alphas,
    )
    params = patch.params
    chosen.append(patch.alphas[0])
  if patch is None:
    raise errors.ConfigError('Patching needs at least one task to be learned.')
  return Patch(params, tuple(chosen), patch.log)


def parallel(
  base_model: typing.Tree,
  tuned: Sequence[typing.Tree],
  evaluate: Callable[[typing.Tree], evaluation.Scores],
  goal: Callable[[evaluation.Scores], float],
  *,
  budget: int = 50,
  strategy: str = 'one_plus_one',
  shared: bool = False,
  alphas: Sequence[float] = ALPHAS,
  seed: int = 0,
  log: base.Log | None = None,
) -> Patch:
  """Adds models tuned apart: `theta_0 + sum_i alpha_i (theta_i - theta_0)`.

  Args:
    base_model: the model to patch.
    tuned: it, fine-tuned on each patching task.
    evaluate: `params -> {task: score}` on held-out data.
    goal: from `objective`.
    budget: evaluations of the search.
    strategy: of `evolve`.
    shared: one alpha for all, on the grid `alphas`, instead of a search.
    alphas: that grid.
    seed: of the search.
    log: where candidates are written down.

  Returns:
    The patched model; its alphas may sum to more than 1.
  """
  count = len(tuned)
  log = base.Log() if log is None else log
  log.maximise(goal)

  def patched(point):
    weights = [float(point[min(i, len(point) - 1)]) for i in range(count)]
    return in_memory.merge(
      tuned, arithmetic.task_arithmetic(), base=base_model, weights=weights
    )

  if shared or count == 1:
    for alpha in sorted(alphas):
      if log.recorded([alpha]) is None:
        log.add([alpha], evaluate(patched([alpha])))
  else:
    space = base.Space('task_arithmetic', count, start=1 / count)
    evolve.evolve(
      space, lambda point: evaluate(patched(point)),
      budget=budget, strategy=strategy, seed=seed, log=log,
    )  # fmt: skip
  best = log.best()
  alphas = tuple(best.point[min(i, len(best.point) - 1)] for i in range(count))
  return Patch(patched(best.point), alphas, log)
