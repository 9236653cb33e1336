# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging one leaf that must be seen at once: stacks, columns, matrices."""

from collections.abc import Callable
import dataclasses
import math

import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.merging import finite
from mergejax.merging import in_memory
from mergejax.merging.disk import pieces
from mergejax.merging.disk import plans


def merge(
  plan: plans.Plan,
  task: plans.Task,
  write: Callable[[int, np.ndarray], None],
  timers: pieces.Timers,
  numbers: tuple[int, int] | None = None,
) -> None:
  """Merges a leaf, or slices of a stack, from all of their inputs.

  Args:
    plan: what is merged.
    task: the parameter.
    write: `(start, array)`, called with what is merged.
    timers: of the merge.
    numbers: of a stack, the first slice to merge and the one after the last;
      all of them by default.
  """
  spec = task.spec
  axis, (first, stop) = 0, numbers or (0, 0)
  if numbers is not None:
    axis = axes_lib.stacked(spec)[0]
    shape = (*spec.shape[:axis], stop - first, *spec.shape[axis + 1 :])
    spec = dataclasses.replace(spec, shape=shape)

  def read(store, path, need=None):
    if numbers is None:
      leaf = np.asarray(store.leaves([path])[path])
    else:
      like_leaf = need is None or need.is_leaf
      leaf = store.read_slices(path, axis if like_leaf else 0, first, stop)
    timers.count_read(leaf.nbytes)
    if need is None or need.values != 'any':
      finite.check_inputs(path, [leaf], [store.name])
    if need is not None:
      pieces.check_sound(store, task, need, leaf)
    return leaf

  stores, method = plan.stores, task.settings.method
  leaves = [
    timers.timed('read', read, stores[name], path) for name, path in task.inputs
  ]
  base = None
  if task.base is not None:
    base = timers.timed('read', read, stores[task.base[0]], task.base[1])
  needs = {need.name: need for need in method.statistics}
  stats = [
    {
      name: timers.timed('read', read, store, path, needs[name])
      for name, path in own.items()
    }
    for store, own in zip(plan.stats, task.stats)
  ] or [{} for _ in leaves]

  def compute():
    path, seed = task.path, plan.recipe.seed
    run = in_memory.Run(method, task.weights, {path: spec}, seed, first)
    merged = run.finish({path: run.laid(path, leaves, base, stats)})[path]
    merged = finite.stored(path, merged, spec.dtype, method.statistics)
    # Slices lie one after the other only along the first axis.
    return np.asarray(merged).reshape(math.prod(spec.shape[:axis]), -1)

  merged = timers.timed('compute', compute)
  width = task.spec.size // merged.shape[0]
  skipped = first * merged.shape[1] // max(1, stop - first)
  for number, row in enumerate(merged):
    timers.timed('write', write, number * width + skipped, row)
