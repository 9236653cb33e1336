# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of a batch, worked through in parts."""

from collections.abc import Mapping
import copy
from typing import Any

import jax
import jax.numpy as jnp

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import frozen
from mergejax.training import objective as objective_lib


def gradient(
  family: models.ModelFamily,
  objective: objective_lib.Objective,
  learned: typing.Tree,
  rest: typing.Tree,
  batch: Mapping[str, Any],
  rngs: Mapping[str, jax.Array],
  parts: int,
) -> tuple[typing.Tree, dict[str, jax.Array], Mapping[str, typing.Tree]]:
  """The gradient of an objective with respect to what learns.

  With parts `i` of normalisers `n_i` it is `sum_i n_i g_i / sum_i n_i`, which
  is that of the whole batch where the loss is a mean over all; a plain sum
  adds up as it is, with the mean over parts of the losses that the model brings.
  Batch norms see one part after the other.

  Args:
    family: of the model.
    objective: what is minimised.
    learned: parameters to differentiate.
    rest: the others.
    batch: arrays `[rows, ...]`.
    rngs: keys of the random streams; each part folds its number in.
    parts: how many; 1 takes the batch as it is.

  Returns:
    `(gradient, metrics, flax collections that changed)`.

  Raises:
    DataError: rows that do not divide into the parts.
  """

  def one(rest, batch, rngs):
    def of(learned):
      params = frozen.join(learned, rest)
      value, outputs = objective(family, params, batch, rngs)
      metrics = dict(outputs.metrics)
      metrics.setdefault('loss', value)
      weight = _normalizer(objective, outputs)
      if weight is None and outputs.losses and parts > 1:
        value, _ = objective(_share(family, parts), params, batch, rngs)
      return value, (metrics, outputs.mutable, weight)

    return jax.grad(of, has_aux=True)(learned)

  if parts == 1:
    grads, (metrics, changed, _) = one(rest, batch, rngs)
    return grads, metrics, changed

  def add(carry, part):
    rest, sums = carry
    number, batch = part
    keys = {n: jax.random.fold_in(key, number) for n, key in rngs.items()}
    grads, (metrics, changed, weight) = one(rest, batch, keys)
    tokens = metrics.get('tokens', jnp.ones((), jnp.float32))
    scale = jnp.ones((), jnp.float32) if weight is None else weight
    found = {
      'grads': jax.tree.map(lambda g: g * scale.astype(g.dtype), grads),
      'weight': scale,
      'tokens': tokens,
      'metrics': {
        name: value * (1.0 if name == 'tokens' else tokens)
        for name, value in metrics.items()
      },
    }
    sums = found if sums is None else jax.tree.map(jnp.add, sums, found)
    return (family.updated(rest, changed), sums), weight

  cut = _parts(batch, parts)
  first = (0, jax.tree.map(lambda x: x[0], cut))
  shapes = jax.eval_shape(lambda: add((rest, None), first)[0][1])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (rest, sums), weights = jax.lax.scan(
    add, (rest, zeros), (jnp.arange(parts), cut)
  )
  divide = lambda by: lambda x: x / jnp.where(by > 0, by, 1.0).astype(x.dtype)
  grads = sums['grads']
  if weights is not None:
    grads = jax.tree.map(divide(sums['weight']), grads)
  metrics = {
    name: value if name == 'tokens' else divide(sums['tokens'])(value)
    for name, value in sums['metrics'].items()
  }
  return grads, metrics, {n: rest[n] for n in family.collections if n in rest}


def _normalizer(objective, outputs):
  """What a loss is a mean over; None if it is a sum."""
  if hasattr(objective, 'normalizer'):
    return objective.normalizer(outputs)
  return jnp.asarray(outputs.metrics.get('tokens', 1.0), jnp.float32)


def _share(family, parts):
  """The family with its own losses divided by the parts that add them up."""
  share = copy.copy(family)

  def apply(*arguments, **settings):
    outputs = family.apply(*arguments, **settings)
    losses = {name: loss / parts for name, loss in outputs.losses.items()}
    return outputs._replace(losses=losses)

  share.apply = apply
  return share


def _parts(batch, parts):
  """`[rows, ...] -> [parts, rows / parts, ...]`, every part from all shards.

  Row r goes to part r mod parts: on a mesh the rows stay where they are.
  """
  cut = {}
  for name, leaf in batch.items():
    rows = leaf.shape[0]
    if rows % parts:
      raise errors.DataError(
        f'{name} of a batch has {rows} rows, which do not divide into '
        f'{parts} parts: choose another batch size or accumulate=.'
      )
    cut[name] = jnp.swapaxes(
      jnp.reshape(leaf, (rows // parts, parts, *leaf.shape[1:])), 0, 1
    )
  return cut
