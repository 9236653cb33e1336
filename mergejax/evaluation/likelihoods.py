# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How likely a model takes the targets of a task to be."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import seqio

from mergejax import models
from mergejax.core import typing
from mergejax.data import splits
from mergejax.evaluation import decode
from mergejax.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Scores the examples of a task, where a `texts.Writer` answers them.

  Attributes:
    family: of the model.
    params: of the model.
    task: of seqio.
    split: the split.
    lengths: tokens of `inputs` and `targets`; longer ones are cut.
    batch_size: rows of a batch.
    mesh: see `metrics.make_scorer`.
  """

  family: models.ModelFamily
  params: typing.Tree
  task: seqio.Task
  split: str
  lengths: Mapping[str, int]
  batch_size: int = 32
  mesh: jax.sharding.Mesh | None = None

  def batches(
    self,
    rows: Sequence[Mapping[str, Any]],
    first: int = 0,
    tokens: Sequence[Sequence[int]] | None = None,
  ) -> Iterator[list[dict[str, Any]]]:
    """Rows with the `score` of their targets, a list a batch.

    The score is `sum log p(token)` in nats over the targets, their end token
    included.

    Args:
      rows: of the whole split, from `texts.of_task`.
      first: how many are scored already; a multiple of `batch_size`.
      tokens: not looked at: targets are read from the task.

    Raises:
      DataError: a token that the model does not know.
    """
    del tokens
    for i in range(first // self.batch_size, len(self._batches)):
      at = i * self.batch_size
      nats, _ = self._scorer(self.params, [self._batches[i]])
      sums = np.asarray(-np.sum(nats, axis=1, dtype=np.float64))
      part = rows[at : at + self.batch_size]
      yield [{**row, 'score': float(x)} for row, x in zip(part, sums)]

  @functools.cached_property
  def _scorer(self):
    return metrics.make_scorer(self.family, 'loss', self.mesh)

  @functools.cached_property
  def _batches(self):
    plain = decode.is_decoder_only(self.family)
    return splits.batches(
      self.task.name,
      lengths=self.lengths,
      batch_size=self.batch_size,
      split=self.split,
      kind='prefix_lm' if plain else 'encoder_decoder',
    )
