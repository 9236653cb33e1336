# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of a batch, worked through in parts."""

from collections.abc import Mapping
import copy
import functools
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
  of_part = functools.partial(_of_part, family, objective, parts)
  if parts == 1:
    grads, (metrics, changed, _) = of_part(learned, rest, batch, rngs)
    return grads, metrics, changed
  # Compiled, so that the model is read once for the shapes and for the loop.
  of_part = jax.jit(of_part)

  def add(carry, part):
    rest, sums = carry
    number, batch = part
    keys = {n: jax.random.fold_in(key, number) for n, key in rngs.items()}
    grads, (metrics, changed, weight) = of_part(learned, rest, batch, keys)
    weighted = _weighted(grads, metrics, weight)
    sums = weighted if sums is None else jax.tree.map(jnp.add, sums, weighted)
    return (family.updated(rest, changed), sums), None

  divided = jnp.arange(parts), _divided(batch, parts)
  first = jax.tree.map(lambda x: x[0], divided)
  shapes = jax.eval_shape(lambda: add((rest, None), first)[0][1])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (rest, sums), _ = jax.lax.scan(add, (rest, zeros), divided)
  grads, metrics = _means(sums, parts)
  return grads, metrics, {n: rest[n] for n in family.collections if n in rest}


def _of_part(family, objective, parts, learned, rest, batch, rngs):
  """`(gradient, (metrics, what changed, normaliser or None))` of one part."""

  def loss(learned):
    params = frozen.join(learned, rest)
    value, outputs = objective(family, params, batch, rngs)
    metrics = dict(outputs.metrics)
    metrics.setdefault('loss', value)
    weight = _normalizer(objective, outputs)
    if weight is None and outputs.losses and parts > 1:
      value, _ = objective(_share(family, parts), params, batch, rngs)
    return value, (metrics, outputs.mutable, weight)

  return jax.grad(loss, has_aux=True)(learned)


def _weighted(grads, metrics, weight):
  """What parts add up: a gradient times its normaliser, means times tokens."""
  if weight is not None:
    grads = jax.tree.map(lambda g: g * weight.astype(g.dtype), grads)
  tokens = metrics.get('tokens', 1.0)
  means = {n: value * tokens for n, value in metrics.items() if n != 'tokens'}
  return {'grads': grads, 'weight': weight, 'metrics': {**metrics, **means}}


def _means(sums, parts):
  """`(gradient, metrics)` of the whole batch, from what its parts add up to."""
  grads, weight, metrics = sums['grads'], sums['weight'], sums['metrics']
  divide = lambda x, by: x / jnp.where(by > 0, by, 1.0).astype(x.dtype)
  if weight is not None:
    grads = jax.tree.map(lambda g: divide(g, weight), grads)
  tokens = metrics.get('tokens', jnp.float32(parts))
  means = {n: divide(x, tokens) for n, x in metrics.items() if n != 'tokens'}
  return grads, {**metrics, **means}


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


def _divided(batch, parts):
  """`[rows, ...] -> [parts, rows / parts, ...]`, every part from all shards.

  Row r goes to part r mod parts: on a mesh the rows stay where they are.
  """
  divided = {}
  for name, leaf in batch.items():
    rows = leaf.shape[0]
    if rows % parts:
      raise errors.DataError(
        f'{name} of a batch has {rows} rows, which do not divide into '
        f'{parts} parts: choose another batch size or accumulate=.'
      )
    divided[name] = jnp.swapaxes(
      jnp.reshape(leaf, (rows // parts, parts, *leaf.shape[1:])), 0, 1
    )
  return divided
