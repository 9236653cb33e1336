# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A suite of tasks evaluated while a model trains, for gin files.

from mergejax.cli import training_scores
train.train_model.callbacks = [@training_scores.suite()]
training_scores.suite:
  path = 'suite.yaml'
  every = 500
  keep_best = 'mean'
"""

from collections.abc import Sequence
import os

from mergejax.evaluation import suite as suite_lib
from mergejax.training import scoring


class suite(scoring.evaluate):  # pylint: disable=invalid-name
  """Scores of the tasks of a suite, every so many steps; higher is better."""

  def __init__(
    self,
    path: os.PathLike | str,
    *,
    every: int,
    split: str = 'validation',
    tasks: Sequence[str] | None = None,
    averages: Sequence[str] = (),
    keep_best: str | None = None,
  ):
    """Makes the callback.

    Args:
      path: the suite, as `mergejax evaluate --suite` takes it.
      every: see `scoring.evaluate`.
      split: which examples.
      tasks: some of the suite; all by default. Losses and bits per byte are
        negated.
      averages: see `scoring.evaluate`.
      keep_best: likewise.
    """
    super().__init__(
      lambda params: {}, every=every, averages=averages, keep_best=keep_best
    )
    self._suite = suite_lib.load(path)
    self._split, self._tasks = split, tasks

  def on_start(self, run):
    super().on_start(run)
    self._fn = scoring.compiled(
      self._suite.evaluator(run.family, self._split, self._tasks)
    )
