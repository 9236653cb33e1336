# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The columns of a table that one task gives."""

from typing import Any

from mergejax import models
from mergejax.core import typing
from mergejax.evaluation import base
from mergejax.evaluation import generated
from mergejax.evaluation import metrics


class Scored:
  """One task: its data, read once, and the programs that score models on it.

  Args:
    suite: a `scoring.Suite`.
    name: of the task.
    split: to score on.
    mesh: what rows are spread over; None where one device does it all.

  Raises:
    UserError: what is wrong with the data.
  """

  def __init__(self, suite: Any, name: str, split: str, mesh: Any = None):
    self._suite, self._name, self._split = suite, name, split
    self._mesh = mesh
    batches = suite.batches(name, split)
    self._task = suite.tasks[name]
    self._batches, self._scorers = {self._task.kind: batches}, {}
    self._generated: Any = None
    if self._task.metric in generated.NAMES:
      self._generated = suite.by_generation(name, split, mesh)

  def columns(
    self, family: models.ModelFamily, params: typing.Tree
  ) -> dict[str, base.Score]:
    """`{column: Score}` of a model: of the task, or of each of its numbers."""
    name, metric = self._name, self._task.metric
    batches = self._of(family)
    if metric == 'exact_match':
      return {name: self._generated.exact_match(family, params, batches)}
    if metric == 'seqio':
      found = self._generated.scores(family, params, batches)
      if len(found) == 1:
        return {name: next(iter(found.values()))}
      return {f'{name}/{number}': score for number, score in found.items()}
    if family.program_key not in self._scorers:
      self._scorers[family.program_key] = metrics.make_scorer(
        family, metric, self._mesh
      )
    values, counts = self._scorers[family.program_key](params, batches)
    return {name: metrics.score(values, counts, metric)}

  def _of(self, family):
    """The batches that a model takes, checked."""
    kind = self._suite.kind_for(self._name, family)
    if kind not in self._batches:
      self._batches[kind] = self._suite.batches(
        self._name, self._split, kind=kind
      )
    self._suite.check_known(family, self._name, self._batches[kind])
    return self._batches[kind]
