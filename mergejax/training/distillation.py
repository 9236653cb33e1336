# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Distillation: a model learns from its targets and from another model.

Switch makes a dense student of a sparse teacher so: the student begins with the
teacher's layers that have no experts (`experts.to_dense.to_dense` with
`how='fresh'`), and the teacher's probabilities count for a quarter.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import batches as batches_lib
from mergejax.training import losses
from mergejax.training import objective as objective_lib

# What the teacher says of a batch, where it has been asked before the step.
TOLD = 'teacher_logits'


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
  """See `distillation`.

  A `Trainer` asks the teacher in a program of its own, with `prepared`, so that
  its parameters are not constants of the step; without it the step asks.
  """

  teacher: models.ModelFamily
  params: typing.Tree
  share: float
  temperature: float
  hard: objective_lib.CrossEntropy
  name: str

  def __repr__(self):
    return (
      f'distillation(teacher={self.name}, share={self.share}, '
      f'temperature={self.temperature}, hard={self.hard})'
    )

  def __call__(self, family, params, batch, rngs):
    value, outputs = self.hard(family, params, batch, rngs)
    told = batch.get(TOLD)
    if told is None:
      told = self.teacher.logits(self.params, batch)
    if told.shape != outputs.logits.shape:
      raise errors.ConfigError(
        f'The teacher says {list(told.shape)} numbers of a batch, the student '
        f'{list(outputs.logits.shape)}: both must have the same vocabulary, or '
        'the same classes.'
      )
    soft, entropy = soft_cross_entropy(
      outputs.logits, told, temperature=self.temperature
    )
    hard, _ = losses.token_cross_entropy(
      outputs.logits, outputs.targets,
      label_smoothing=self.hard.label_smoothing,
    )  # fmt: skip
    value = value + self.share * self.hard.mean(soft - hard, outputs)
    kl = losses.weighted_mean(
      (soft - entropy) / self.temperature**2, outputs.weights
    )
    return value, outputs._replace(
      metrics={**outputs.metrics, 'teacher_kl': kl}
    )

  def normalizer(self, outputs: models.Outputs) -> jax.Array | None:
    return self.hard.normalizer(outputs)

  def check_batch(
    self, family: models.ModelFamily, batch: Mapping[str, Any], source: str
  ) -> None:
    """Raises if the teacher does not know a batch."""
    del family
    if not self.teacher.takes(batch):
      raise errors.DataError(
        f'The teacher, a {self.teacher.model_type} model, cannot be called with '
        f'{source}, which has {", ".join(sorted(batch))}: take a teacher of the '
        "student's kind."
      )
    self.teacher.check_batch(batch, f'{source} (for the teacher)')

  def prepared(
    self,
    mesh: jax.sharding.Mesh,
    rules: partition.ShardingRules,
    *,
    stacked: bool = False,
  ) -> Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """A function that adds what the teacher says to a batch on a mesh.

    Args:
      mesh: where the teacher's parameters go too.
      rules: what of them lies where.
      stacked: batches have a leading axis of experts.
    """
    axes = {name: spec.axes for name, spec in self.teacher.specs().items()}
    layout = partition.shardings(mesh, self.params, axes, rules)
    params = jax.tree.map(batches_lib.whole, self.params, layout)

    def told(params, batch):
      with partition.rules_of(mesh, rules):
        return self.teacher.logits(params, batch)

    if stacked:
      told = jax.vmap(told, in_axes=(None, 0), spmd_axis_name='branch')
    ask = jax.jit(told)
    return lambda batch: {**batch, TOLD: ask(params, dict(batch))}


def distillation(
  teacher: os.PathLike | str | tuple[nn.Module | models.ModelFamily, Any],
  *,
  share: float = 0.25,
  temperature: float = 1.0,
  **hard: Any,
) -> Distillation:
  """Cross entropy with targets of which a teacher's probabilities are a part.

  `-sum_v ((1 - share) 1[v = y] + share q_v) log p_v`, the soft part at a
  temperature T: `T^2 share (-sum_v q_v^(1/T) log p_v^(1/T))`, both normalised.
  Its gradient is 0 where student and teacher say the same.

  Args:
    teacher: a checkpoint with its `config.json`, or `(model, parameters)`. It
      is asked in evaluation mode, and learns nothing.
    share: of the soft part; Switch's 0.25, so that the labels have 0.75.
    temperature: T; 1 in Switch. Above it the unlikely answers count for more;
      T^2 keeps the size of the gradient, as in Hinton et al. (2015).
    **hard: options of `objective.cross_entropy`.

  Returns:
    An objective with the metrics of `cross_entropy` and `teacher_kl`, the nats
    per target from the teacher's probabilities to the student's, at T.

  Raises:
    ConfigError: numbers that are none. A teacher of another vocabulary, or
      kind, is told of when the first step is made.
    UserError: no such checkpoint.

  Example:
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> family = models.family_of(module)
    >>> params, batch = family.init(jax.random.key(0)), family.example_batch(2)
    >>> loss = objective_lib.make_loss(module, distillation((module, params)))
    >>> bool(abs(loss(params, batch)[1]['teacher_kl']) < 1e-6)
    True

  Source: Fedus et al., "Switch Transformers" (2021),
  https://arxiv.org/abs/2101.03961, section 4.2 and table 6; Hinton et al.
  (2015), https://arxiv.org/abs/1503.02531, section 2, for the temperature.
  """
  errors.check_number('share', share, 0.0, 1.0)
  errors.check_number('temperature', temperature, 0.0, open_below=True)
  cross_entropy = objective_lib.cross_entropy(**hard)
  if isinstance(teacher, tuple):
    model, params = teacher
    name = fingerprints.fingerprint(params)
  else:
    name = fingerprints.fingerprint(checkpoint.open_checkpoint(teacher))
    model, params = models.load_model(teacher)
  return Distillation(
    models.family_of(model), params, share, temperature, cross_entropy, name
  )


def soft_cross_entropy(
  logits: typing.Array, teacher: typing.Array, *, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of every position with a teacher's probabilities.

  `T^2 (-sum_v q_v log p_v)` with `q = softmax(teacher / T)`, `p =
  softmax(logits / T)`.

  Args:
    logits: `<float>[..., vocab]`; computed in float32.
    teacher: `<float>[..., vocab]` logits; no gradient reaches them.
    temperature: T.

  Returns:
    `(loss, the same of the teacher itself)`, each `<float32>[...]`; the
    difference over T^2 is the KL divergence.
  """
  scaled = lambda x: jax.nn.log_softmax(x.astype(jnp.float32) / temperature)
  log_q = scaled(jax.lax.stop_gradient(teacher))
  q = jnp.exp(log_q)
  # A token of probability 0 has no part, be its logarithm -inf.
  product = lambda log_p: jnp.where(q > 0, q * log_p, 0.0)
  size = temperature**2
  return (
    -size * jnp.sum(product(scaled(logits)), axis=-1),
    -size * jnp.sum(product(log_q), axis=-1),
  )
