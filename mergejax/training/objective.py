# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What training minimises: `(family, params, batch, rngs) -> (loss, Outputs)`.

An objective of your own is such a function, in a file of yours; gin names it by
its import path, `train.train_model.objective = @my_file.objective`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import losses

_PER_SEQUENCE = 'AVERAGE_PER_SEQUENCE'


class Objective(Protocol):
  """A number to minimise, and what was found on the way.

  The metrics of the outputs are logged. `tokens`, the sum of the weights, says
  how much a batch counts: where it is 0 the step changes nothing.
  An objective may have a method `normalizer(outputs) -> <float32>[] | None`:
  what its loss is a mean over, None if it is a sum; by default `tokens`. With
  it microbatches add up to the whole batch.
  It may have a method `check_batch(family, batch, source)` that raises a
  `DataError` for a batch, in host memory, that it cannot be computed of; and a
  method `prepared(mesh, rules, stacked=False)` that gives a function of a batch
  on the mesh, which adds what is computed outside of the step.
  """

  def __call__(
    self,
    family: models.ModelFamily,
    params: typing.Tree,
    batch: Mapping[str, Any],
    rngs: Mapping[str, jax.Array],
  ) -> tuple[jax.Array, models.Outputs]: ...


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """See `cross_entropy`; two with the same numbers are the same objective."""

  z_loss: float
  label_smoothing: float
  normalizing_factor: str | float | None
  tasks: int = 0

  def __call__(self, family, params, batch, rngs):
    outputs = family.apply(
      family.variables(params), batch, train=True, rngs=rngs
    )
    weights, targets, logits = outputs.weights, outputs.targets, outputs.logits
    if weights.shape != targets.shape:
      # Broadcast, each would count for others.
      raise errors.DataError(
        f'A batch has weights of shape {list(weights.shape)} for targets of '
        f'shape {list(targets.shape)}: give every target a weight of its own.'
      )
    token_loss, z_part = losses.token_cross_entropy(
      logits, targets, z_loss=self.z_loss, label_smoothing=self.label_smoothing
    )
    tokens = jnp.sum(weights)
    mean = lambda values: losses.weighted_mean(values, weights)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    metrics = {
      'loss': mean(token_loss - z_part),
      'z_loss': mean(z_part),
      'accuracy': mean(correct),
      'tokens': tokens,
    }
    if self.tasks:
      metrics['tasks'] = by_task(
        batch, outputs, token_loss - z_part, self.tasks
      )
    value = self.mean(token_loss, outputs)
    for extra in outputs.losses.values():
      # A batch of nothing else than padding has nothing to learn from.
      value = value + jnp.where(tokens > 0, extra, 0.0)
    return value, outputs._replace(
      metrics={**metrics, **outputs.losses, **outputs.metrics}
    )

  def mean(self, values: jax.Array, outputs: models.Outputs) -> jax.Array:
    """`<float32>[]`: values of the targets, weighted and divided as the loss."""
    factor, weights = self._factor(outputs)
    factor = jnp.where(jnp.sum(outputs.weights) > 0, factor, 1.0)
    return losses.weighted_sum(values, weights) / factor

  def normalizer(self, outputs: models.Outputs) -> jax.Array | None:
    if not isinstance(self.normalizing_factor, str):
      return None
    if outputs.weights.ndim == 1 and self.normalizing_factor == _PER_SEQUENCE:
      # One target a row: all rows are one sequence, whose mean it is.
      return jnp.sum(outputs.weights)
    return jnp.asarray(self._factor(outputs)[0], jnp.float32)

  def _factor(self, outputs):
    return losses.normalizer(
      self.normalizing_factor,
      outputs.targets,
      outputs.weights,
      outputs.segments,
    )


def cross_entropy(
  *,
  z_loss: float = 1e-4,
  label_smoothing: float = 0.0,
  normalizing_factor: str | float | None = 'NUM_REAL_TARGET_TOKENS',
  tasks: int = 0,
) -> CrossEntropy:
  """Cross entropy with the losses that the model brings added.

  `sum_i w_i (cross entropy_i + z_loss (log Z_i)^2) / factor + sum of
  outputs.losses`.

  Args:
    z_loss: see `losses.token_cross_entropy`; T5's 1e-4.
    label_smoothing: likewise; T5's 0.
    normalizing_factor: see `losses.normalizer`. Per real token by default, so
      that the loss and its gradient do not depend on the batch size; T5X's
      default is None, the plain sum.
    tasks: how many tasks the batches' `decoder_task_ids` tell apart; 0 leaves
      them alone. See `by_task`.

  Returns:
    An objective with the metrics `loss` (nats per token, without z-loss),
    `z_loss`, `accuracy` and `tokens`, and the model's own. Of a batch of
    padding alone loss, metrics and gradient are 0.
  """
  return CrossEntropy(z_loss, label_smoothing, normalizing_factor, tasks)


def by_task(
  batch: Mapping[str, Any],
  outputs: models.Outputs,
  token_loss: jax.Array,
  tasks: int,
) -> jax.Array:
  """What each task has of a batch, as shares of all its tokens.

  Shares of parts of a batch, weighted by their tokens, add up to those of the
  whole, as means by task would not. `transforms.task_metrics` makes means of
  them.

  Args:
    batch: with `decoder_task_ids <int32>[rows, length]`, 1 to `tasks`.
    outputs: of the model.
    token_loss: `<float32>[rows, length]`.
    tasks: how many there are.

  Returns:
    `<float32>[3, tasks]`: summed loss, weight, and number of examples, each by
    the weight of the batch.

  Raises:
    DataError: a batch without the numbers of its tasks.
  """
  ids = batch.get('decoder_task_ids')
  if ids is None or ids.shape != outputs.targets.shape:
    raise errors.DataError(
      'Losses by task need `decoder_task_ids` for every target of a batch: '
      'open its stream with task_ids=True.'
    )
  weights = outputs.weights
  real = (weights != 0).astype(jnp.float32)
  segments = outputs.segments
  if segments is None:
    segments = jnp.ones_like(ids)
  # The first target of an example that counts: the targets that count up to it
  # are one more than those before the example.
  begins = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1] != segments
  upto = jnp.cumsum(real, axis=1)
  before = jax.lax.cummax(jnp.where(begins, upto - real, 0.0), axis=1)
  first = real * (upto - before == 1).astype(jnp.float32)
  of_task = jax.nn.one_hot(ids - 1, tasks, dtype=jnp.float32)
  loss = jnp.where(weights != 0, token_loss, 0.0) * weights
  values = jnp.stack([loss, weights.astype(jnp.float32), first])
  sums = jnp.einsum('kbl,blt->kt', values, of_task)
  total = jnp.sum(weights)
  return sums / jnp.where(total > 0, total, 1.0)


def rng_streams(
  family: models.ModelFamily, key: jax.Array
) -> dict[str, jax.Array]:
  """A key for every random stream of a model in training.

  The first stream has the key itself, further ones fold in their place.
  """
  names = family.rng_streams(train=True)
  return {
    name: jax.random.fold_in(key, i) if i else key
    for i, name in enumerate(names)
  }


def make_loss(
  model: nn.Module | models.ModelFamily, objective: Objective | None = None
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """An objective as a plain function of parameters, for `jax.grad`.

  Args:
    model: a module, or its family.
    objective: `cross_entropy()` by default.

  Returns:
    `loss(params, batch, key=None) -> (loss, metrics)`; random streams are
    drawn from the key, if there is one.

  Example:
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> family = models.family_of(module)
    >>> params = family.init(jax.random.key(0))
    >>> loss, _ = make_loss(module)(params, family.example_batch(2))
    >>> float(loss) > 0
    True
  """
  family = models.family_of(model)
  objective = objective or cross_entropy()

  def loss(params, batch, key=None):
    rngs = {} if key is None else rng_streams(family, key)
    value, outputs = objective(family, params, batch, rngs)
    return value, dict(outputs.metrics)

  return loss
