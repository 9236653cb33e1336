# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Loss and accuracy between models: on a line, and on a plane of three."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.evaluation import base as evaluation
from mergejax.merging import in_memory
from mergejax.methods import arithmetic
from mergejax.methods import mean
from mergejax.search import base as search_base
from mergejax.search import grid


@dataclasses.dataclass(frozen=True)
class Line:
  """Values along `(1 - lambda) theta_a + lambda theta_b`.

  Attributes:
    lambdas: <float64>[points] from 0 to 1.
    values: `{name: <float64>[points]}`, such as `loss` and `accuracy`.
    losses: the names of those of which less is better.
  """

  lambdas: np.ndarray
  values: Mapping[str, np.ndarray]
  losses: tuple[str, ...] = ('loss',)

  def barrier(self, name: str = 'loss') -> float:
    """`max over lambda of L(lambda) - [(1 - lambda) L(0) + lambda L(1)]`.

    Zero or below where the line never rises over the chord; for scores where
    more is better, the barrier of their negative.

    Raises:
      ConfigError: the line has no values of this name.
    """
    if name not in self.values:
      raise errors.ConfigError(
        errors.near(name, self.values, 'value of a line')
      )
    values = self.values[name]
    values = values if name in self.losses else -values
    chord = (1 - self.lambdas) * values[0] + self.lambdas * values[-1]
    return float((values - chord).max())


def line(
  a: typing.Tree,
  b: typing.Tree,
  evaluate: evaluation.Evaluator | Callable[[typing.Tree], Mapping[str, Any]],
  *,
  points: int = 25,
  prepare: Callable[[typing.Tree], typing.Tree] | None = None,
) -> Line:
  """Evaluates models between two others; the ends are the models themselves.

  Args:
    a: the model at lambda 0.
    b: the model at lambda 1; align it first with `align`.
    evaluate: `params -> {'loss': ..., 'accuracy': ...}`, where less is better
      of what is called `loss` alone; or an `Evaluator`, of all of whose scores
      more is better (a suite negates losses), and which runs all points in one
      compiled loop.
    points: 25 in the plots of the Git Re-Basin code.
    prepare: applied to each interpolated model, such as `norms.refresh_norms`;
      not with an `Evaluator`.

  Returns:
    The curve.

  Raises:
    UserError: models that differ, fewer than two points.
  """
  tree_lib.check_same(
    tree_lib.specs(a), tree_lib.specs(b),
    expected_name='model a', given_name='model b',
  )  # fmt: skip
  if points < 2:
    raise errors.ConfigError(f'A line has at least two points, not {points}.')
  lambdas = np.linspace(0.0, 1.0, points)
  values = _values(between, (a, b), evaluate, lambdas[:, None], prepare)
  losses = () if isinstance(evaluate, evaluation.Evaluator) else ('loss',)
  return Line(lambdas, values, losses)


def between(pair: Any, point: typing.Array) -> typing.Tree:
  """`(1 - point[0]) a + point[0] b`, in float32, cast back; traceable."""
  a, b = pair
  return in_memory.merge([b], mean.interpolate(alpha=point[0]), base=a)


def _values(mix, inputs, evaluate, points, prepare):
  if prepare is not None:
    plain = evaluate
    evaluate = lambda params: plain(prepare(params))
  log = grid.grid(
    mix, inputs, evaluate, points,
    log=search_base.Log(objective=lambda scores: 0.0),
  )  # fmt: skip
  names = log.candidates[0].scores
  return {
    name: np.array([one.scores[name] for one in log.candidates])
    for name in names
  }


@dataclasses.dataclass(frozen=True)
class Plane:
  """Values on the plane through three models.

  Attributes:
    x: <float64>[columns], coordinates along `theta_b - theta_a`.
    y: <float64>[rows], along the part of `theta_c - theta_a` at right angles.
    corners: <float64>[3, 2], where the three models lie.
    values: `{name: <float64>[rows, columns]}`.
  """

  x: np.ndarray
  y: np.ndarray
  corners: np.ndarray
  values: Mapping[str, np.ndarray]


def plane(
  a: typing.Tree,
  b: typing.Tree,
  c: typing.Tree,
  evaluate: evaluation.Evaluator | Callable[[typing.Tree], Mapping[str, Any]],
  *,
  points: int = 11,
  margin: float = 0.2,
) -> Plane:
  """Evaluates models on the plane through three of them.

  Coordinates are distances in weight space: a lies at (0, 0), b at
  (|b - a|, 0).

  Args:
    a: first model.
    b: second model.
    c: third model, not on the line through the others.
    evaluate: as for `line`.
    points: in each direction.
    margin: how far the picture reaches beyond the models, as a share.

  Returns:
    The values.

  Raises:
    UserError: models that differ, or that lie on one line.
  """
  for name, other in (('model b', b), ('model c', c)):
    tree_lib.check_same(
      tree_lib.specs(a), tree_lib.specs(other),
      expected_name='model a', given_name=name,
    )  # fmt: skip
  dot = lambda u, v: sum(
    float(jnp.vdot(x, y))
    for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v))
  )
  apart = lambda u: jax.tree.map(
    lambda x, y: numerics.widen(x) - numerics.widen(y)
    if numerics.is_averaged(x.dtype)
    else jnp.zeros((), jnp.float32),
    u, a,
  )  # fmt: skip
  to_b, to_c = apart(b), apart(c)
  width = np.sqrt(dot(to_b, to_b))
  if not width:
    raise errors.StructureError(
      'Models a and b are the same: they span no plane.'
    )
  along = dot(to_c, to_b) / width
  height = np.sqrt(max(dot(to_c, to_c) - along**2, 0.0))
  if height <= 1e-6 * width:
    raise errors.StructureError('The three models lie on one line: no plane.')
  corners = np.array([[0.0, 0.0], [width, 0.0], [along, height]])
  low, high = corners.min(axis=0), corners.max(axis=0)
  room = margin * (high - low)
  x, y = (
    np.linspace(low[i] - room[i], high[i] + room[i], points) for i in (0, 1)
  )
  # A point is a + s (b - a) + t (c - a).
  grid_points = []
  for v in y:
    for u in x:
      t = v / height
      grid_points.append(((u - t * along) / width, t))
  values = _values(_on_plane, (a, b, c), evaluate, np.array(grid_points), None)
  shaped = {n: v.reshape(points, points) for n, v in values.items()}
  return Plane(x, y, corners, shaped)


def _on_plane(corners, point):
  """`a + point[0] (b - a) + point[1] (c - a)`; traceable."""
  a, *others = corners
  weights = [point[0], point[1]]
  return in_memory.merge(
    others, arithmetic.task_arithmetic(), base=a, weights=weights
  )
