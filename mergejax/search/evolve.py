# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Coefficients without gradients: random draws, (1+1)-ES and CMA-ES."""

from collections.abc import Callable
import importlib
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.evaluation import base as evaluation
from mergejax.methods import base as merge_base
from mergejax.search import base

STRATEGIES = ('random', 'one_plus_one', 'cmaes')


def evolve(
  space: base.Space,
  evaluate: Callable[[np.ndarray], evaluation.Scores],
  *,
  budget: int,
  strategy: str = 'cmaes',
  seed: int = 0,
  log: base.Log | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> base.Log:
  """Looks for good coefficients by trying `budget` points.

  Args:
    space: what is searched over; the first point is its start.
    evaluate: `point -> {task: score}`, higher is better.
    budget: evaluations in all.
    strategy: 'random' draws evenly; 'one_plus_one' moves the best point by
      Gaussian steps that grow after a success and shrink after a failure, for
      a few coefficients; 'cmaes' learns their covariance.
    seed: fixes every draw.
    log: where candidates are written down; what it holds is not tried again.
    progress: called with the evaluations done and the budget.

  Returns:
    The log with `budget` candidates.

  Raises:
    UserError: an unknown strategy, a budget below 1, CMA-ES not installed.

  Source: CMA-ES as in the package `cmaes`; the 1/5 rule of the (1+1)-ES is
  Rechenberg's.
  """
  merge_base.check_choice('strategy', strategy, STRATEGIES)
  merge_base.check_option('budget', budget, lambda v: v >= 1, '1 or above')
  log = base.Log() if log is None else log
  ask, tell = _STRATEGIES[strategy](space, seed)
  for done in range(budget):
    point = np.full(len(space.names), space.start) if not done else ask()
    found = log.recorded(point)
    if found is None:
      found = log.add(point, evaluate(point))
    tell(point, found.objective)
    progress(done + 1, budget)
    log.check_stop()
  return log


def _random(space, seed):
  rng = np.random.default_rng(seed)
  size = len(space.names)
  return lambda: rng.uniform(space.low, space.high, size), lambda *_: None


def _one_plus_one(space, seed):
  rng = np.random.default_rng(seed)
  best: dict[str, Any] = {'value': -np.inf, 'point': None}
  step = 0.3 * (space.high - space.low)

  def ask():
    moved = best['point'] + step * rng.normal(size=len(space.names))
    return np.clip(moved, space.low, space.high)

  def tell(point, value):
    nonlocal step
    if value >= best['value']:
      first = best['point'] is None
      best.update(value=value, point=point)
      step *= 1 if first else 1.5
    else:
      step *= 1.5**-0.25

  return ask, tell


def _cmaes(space, seed):
  try:
    cmaes = importlib.import_module('cmaes')
  except ImportError as error:
    raise errors.ConfigError(
      "CMA-ES needs the package cmaes: pip install 'mergejax[search]', or "
      "choose strategy 'one_plus_one'."
    ) from error
  size = len(space.names)
  waiting: list[tuple[np.ndarray, float]] = []
  # A single coefficient is doubled: the package asks for two dimensions.
  wide = max(size, 2)
  optimizer = cmaes.CMA(
    mean=np.full(wide, space.start),
    sigma=0.25 * (space.high - space.low),
    bounds=np.array([[space.low, space.high]] * wide),
    seed=seed,
  )
  asked: list[np.ndarray] = []

  def ask():
    asked.append(optimizer.ask())
    return asked[-1][:size]

  def tell(point, value):
    del point
    if not asked:
      return  # the start, which it did not ask for
    # It minimises, and orders by value alone.
    waiting.append((asked[-1], -value if np.isfinite(value) else 1e30))
    if len(waiting) == optimizer.population_size:
      optimizer.tell(list(waiting))
      waiting.clear()

  return ask, tell


_STRATEGIES = {
  'random': _random,
  'one_plus_one': _one_plus_one,
  'cmaes': _cmaes,
}
