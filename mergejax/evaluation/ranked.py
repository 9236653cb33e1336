# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rank classification as an evaluator: which answer is the most likely one."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.evaluation import base
from mergejax.training import choices as choices_lib


def rank_evaluator(
  model: nn.Module | models.ModelFamily,
  tasks: Mapping[str, Sequence[Mapping[str, Any]]],
  *,
  length_norm: float = 1.0,
  parts: int = 1,
) -> base.Evaluator:
  """Accuracy of rank classification on tasks, for training, searches, tables.

  Args:
    model: an encoder-decoder, or its family, adapted or not.
    tasks: `{task: batches}`, each as `training.choices.batch_of` makes them;
      those of a task are padded to one shape, which changes no score. Rows
      without a choice do not count.
    length_norm: as in training, see `training.t_few`.
    parts: see `training.choices.rank`.

  Returns:
    An evaluator; its scores are `<float32>[]` shares of the rows.

  Raises:
    DataError: a batch whose choices are not choices, or that has other names
      than the others of its task; a task without a row to be ranked.
  """
  family = models.family_of(model)
  data = {}
  for task, batches in tasks.items():
    if not batches:
      raise errors.DataError(f'The task {task} has no batch to be ranked.')
    for batch in batches:
      family.check_batch(batch, f'the task {task}')
      choices_lib.check(
        batch, f'the task {task}', getattr(family.config, 'vocab_size', None)
      )
    data[task] = _stacked(task, batches)

  def score(params, data):
    def of_batch(batch):
      found = choices_lib.rank(
        family, params, batch, length_norm=length_norm, parts=parts
      )
      counts = jnp.isfinite(found.gold)
      right = counts & (found.prediction == batch[choices_lib.LABELS])
      return jnp.sum(right), jnp.sum(counts)

    scores = {}
    for task, batches in data.items():
      right, count = map(jnp.sum, jax.lax.map(of_batch, batches))
      scores[task] = right.astype(jnp.float32) / count.astype(jnp.float32)
    return scores

  return base.Evaluator(score, data)


def _stacked(task, batches):
  """Batches as one, `[batches, rows, ...]`, padded with zeros: with no choice."""
  every = lambda batch: np.ones(batch[choices_lib.TOKENS].shape[:2], np.bool_)
  given = [{choices_lib.MASK: every(batch), **batch} for batch in batches]
  names = [{*batch} for batch in given]
  odd = set.union(*names) - set.intersection(*names)
  if odd:
    raise errors.DataError(
      f'Some batches of the task {task} have {errors.some(sorted(odd))}, and '
      'others do not: give all of them the same arrays.'
    )
  found = {}
  for name in given[0]:
    arrays = [np.asarray(batch[name]) for batch in given]
    shape = np.max([x.shape for x in arrays], axis=0)
    found[name] = np.stack([
      np.pad(x, [(0, more) for more in shape - x.shape]) for x in arrays
    ])  # fmt: skip
  if not found[choices_lib.MASK].any():
    raise errors.DataError(
      f'The task {task} has no row with choices: nothing can be ranked.'
    )
  return found
