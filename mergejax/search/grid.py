# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Coefficients by grid: merge and evaluation in one compiled loop."""

from collections.abc import Callable
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import base as evaluation
from mergejax.search import base

_MOST_POINTS = 20_000


def line(space: base.Space, points: int) -> np.ndarray:
  """`<float64>[points, 1]` evenly spread from low to high, both included."""
  return np.linspace(space.low, space.high, points)[:, None]


def lattice(space: base.Space, points: int) -> np.ndarray:
  """`<float64>[points ** n, n]`: every combination of evenly spread values.

  Raises:
    UserError: more combinations than anyone would wait for.
  """
  count = len(space.names)
  if points**count > _MOST_POINTS:
    raise errors.ConfigError(
      f'A grid of {points} values for each of {count} coefficients has '
      f'{points}^{count} points, and a grid at most {_MOST_POINTS}. Vary one '
      'number (`vary: scale` or `weight`), or take the strategy '
      "'cmaes' or 'gradient'."
    )
  axis = np.linspace(space.low, space.high, points)
  return np.array(list(itertools.product(axis, repeat=count)))


def pairs(points: int = 51) -> np.ndarray:
  """Two models' coefficients `(1, 0)` to `(0, 1)` in even steps.

  Returns:
    `<float64>[points, 2]`, the grid of Matena and Raffel (2022).
  """
  second = np.linspace(0.0, 1.0, points)
  return np.stack([1 - second, second], axis=1)


def dirichlet(count: int, draws: int, seed: int = 0) -> np.ndarray:
  """`<float64>[draws, count]` from the flat Dirichlet: more than two models."""
  return np.random.default_rng(seed).dirichlet(np.ones(count), draws)


def grid(
  merge: Callable[[Any, typing.Array], typing.Tree],
  models: Any,
  evaluate: evaluation.Evaluator | Callable[[typing.Tree], evaluation.Scores],
  points: np.ndarray,
  *,
  log: base.Log | None = None,
  chunk: int = 7,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> base.Log:
  """Scores every point of a grid.

  With an `Evaluator` one compiled program holds models and data on the device
  and loops over the points: no merged model ever leaves it. With a plain
  function every point is merged, then evaluated.

  Args:
    merge: `(models, point <float32>[n]) -> params`, traceable for an
      `Evaluator`; see `Space.merge`.
    models: what merge reads: trees and statistics.
    evaluate: how good parameters are.
    points: <float>[points, n].
    log: where candidates are written down; what it holds is not tried again.
    chunk: points of one call of the program; the log grows by as many.
    progress: called with the points done and their number.

  Returns:
    The log with all points.
  """
  log = base.Log() if log is None else log
  points = np.asarray(points, np.float64)
  missing = [point for point in points if log.recorded(point) is None]
  done = len(points) - len(missing)
  if not isinstance(evaluate, evaluation.Evaluator):
    for point in missing:
      log.add(point, evaluate(merge(models, jnp.asarray(point, jnp.float32))))
      done += 1
      progress(done, len(points))
      log.check_stop()
    return log

  @jax.jit
  def score_all(models, data, points):
    return jax.lax.map(
      lambda point: evaluate.score(merge(models, point), data), points
    )

  models = jax.device_put(models)
  size = min(chunk, len(points))
  for start in range(0, len(missing), chunk):
    part = missing[start : start + chunk]
    # The last part is filled up, so that one program serves all.
    filled = np.stack(part + [part[-1]] * (size - len(part)))
    scores = jax.device_get(
      score_all(models, evaluate.data, jnp.asarray(filled, jnp.float32))
    )
    for i, point in enumerate(part):
      log.add(point, {task: values[i] for task, values in scores.items()})
    done += len(part)
    progress(done, len(points))
    log.check_stop()
  return log
