# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mj.merge`: methods and stores joined, for people."""

from collections.abc import Sequence
from typing import Any

from mergejax import axes as axes_lib
from mergejax import typing
from mergejax.merging import base as merge_base
from mergejax.merging import driver
from mergejax.merging import named
from mergejax.store import checkpoint


def merge(
  models: Sequence[Any],
  method: str | merge_base.Merge,
  *,
  base: Any = None,
  weights: Sequence[Any] | None = None,
  stats: Sequence[Any] | None = None,
  axes: axes_lib.Rules = (),
  dtype: Any = None,
  seed: int = 0,
  **options: Any,
) -> typing.Tree:
  """Merges models given as trees, stores or paths.

  Args:
    models: pytrees of arrays, stores from `open_checkpoint`, or paths.
    method: a name of the menu (`'linear'`, `'task_arithmetic'`, ...) or a
      `Merge` built from one: `mj.task_arithmetic(scale=0.4)`.
    base: the common ancestor, where the method needs one.
    weights: one coefficient a model; see the method for the default.
    stats: statistics of each model, `{path: {name: array}}`, for `fisher` and
      `regmean`.
    axes: `(regular expression, logical axes)` of leaves whose layout their
      path does not tell, or that are stacks of layers.
    dtype: dtype of the result's floating leaves; by default as stored.
    seed: seeds random methods.
    **options: options of the named method.

  Returns:
    The merged tree; see `merging.driver.merge` for precision, sharding and jit.

  Raises:
    UserError: unknown method or option, a missing base, differing trees,
      weights that do not fit.

  Example:
    >>> merge([{'w': np.zeros(2)}, {'w': np.ones(2)}], 'linear')
    {'w': Array([0.5, 0.5], dtype=float32)}
  """
  return driver.merge(
    models,
    named.resolve(method, **options),
    base=base,
    weights=weights,
    stats=stats,
    axes=axes,
    dtype=dtype,
    seed=seed,
    opener=checkpoint.open_checkpoint,
  )
