# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Straight-through estimator: the permutation with the best midpoint."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import optax

from mergejax.align import spec as spec_lib
from mergejax.align import weights as weights_lib
from mergejax.core import errors
from mergejax.core import typing


class Found(NamedTuple):
  """What the search came to.

  Attributes:
    permutation: that of the least midpoint loss.
    loss: this loss, on the validation batch.
    losses: of the midpoint on each training batch.
  """

  permutation: spec_lib.Permutation
  loss: float
  losses: tuple[float, ...]


def midpoint_loss(
  loss: Callable[[typing.Tree, Any], jax.Array],
  free: typing.Tree,
  a: typing.Tree,
  projected: typing.Tree,
  batch: Any,
) -> jax.Array:
  """Loss halfway between `a` and the projection; gradients reach `free`.

  `L(a / 2 + (sg(projected) + free - sg(free)) / 2)`: the value is that of the
  projected model, the gradient goes to the free parameters.
  """

  def halfway(x, y, f):
    through = jax.lax.stop_gradient(y) + (f - jax.lax.stop_gradient(f))
    return 0.5 * x + 0.5 * through

  return loss(jax.tree.map(halfway, a, projected, free), batch)


def match_straight_through(
  spec: spec_lib.PermutationSpec,
  loss: Callable[[typing.Tree, Any], jax.Array],
  a: typing.Tree,
  b: typing.Tree,
  batches: Iterable[Any],
  validation: Any,
  *,
  key: jax.Array | int = 0,
  optimizer: optax.GradientTransformation | None = None,
  validate_every: int = 10,
  progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Found:
  """Looks for the permutation of b with the least loss at the midpoint.

  Free parameters start at a. Each step matches b to them by weight, from the
  permutation before; the loss of the midpoint moves them.

  Args:
    spec: the groups.
    loss: `(params, batch) -> number`, differentiable.
    a: the model to be matched.
    b: the model to be permuted; it stays as it is.
    batches: one a step.
    validation: the batch on which permutations are compared.
    key: for the orders of weight matching.
    optimizer: SGD with rate 0.01 and momentum 0.9, as in the paper's code.
    validate_every: steps between two looks at the validation batch; the first
      and the last are always looked at.
    progress: called with the step and its loss.

  Returns:
    The best permutation seen. It is a copy: matching on does not change it, as
    it does in the released code.

  Raises:
    UserError: no batch, models that do not fit.

  Source: Ainsworth et al. (2023), https://arxiv.org/abs/2209.04836, algorithm
  2.
  """
  optimizer = optimizer or optax.sgd(1e-2, momentum=0.9)
  a, b = jax.device_put(a), jax.device_put(b)
  free, state = a, optimizer.init(a)

  @jax.jit
  def step(free, state, projected, batch):
    value, gradient = jax.value_and_grad(midpoint_loss, argnums=1)(
      loss, free, a, projected, batch
    )
    updates, state = optimizer.update(gradient, state, free)
    return optax.apply_updates(free, updates), state, value

  score = jax.jit(lambda moved: midpoint_loss(loss, a, a, moved, validation))
  rng = weights_lib.make_rng(key)
  found = None
  best, best_loss, losses = None, float('inf'), []

  def project(free, found):
    found = weights_lib.match_weights(
      spec, free, b, int(rng.integers(2**31)), initial=found
    )
    return found, spec_lib.permute(spec, found, b)

  def compare(found, projected, best, best_loss):
    value = float(score(projected))
    if value < best_loss:
      return {n: x.copy() for n, x in found.items()}, value
    return best, best_loss

  for i, batch in enumerate(batches):
    found, projected = project(free, found)
    if i % validate_every == 0:
      best, best_loss = compare(found, projected, best, best_loss)
    free, state, value = step(free, state, projected, batch)
    losses.append(float(value))
    progress(i + 1, losses[-1])
  if not losses:
    raise errors.DataError('There was no batch to search with.')
  found, projected = project(free, found)
  best, best_loss = compare(found, projected, best, best_loss)
  if best is None:
    raise errors.DataError(
      'The midpoint loss was never finite; check the models and the batches.'
    )
  return Found(best, best_loss, tuple(losses))
