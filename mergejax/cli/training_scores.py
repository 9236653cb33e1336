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

from collections.abc import Mapping, Sequence
import os

import numpy as np
import seqio

from mergejax import adapters
from mergejax.core import errors
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import task_ids
from mergejax.evaluation import ranked as ranked_lib
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


class ranked(scoring.evaluate):  # pylint: disable=invalid-name
  """Accuracy of rank classification, every so many steps."""

  def __init__(
    self,
    tasks: seqio.Task | seqio.Mixture | str,
    *,
    lengths: Mapping[str, int],
    every: int,
    trained: seqio.Task | seqio.Mixture | str | None = None,
    split: str = 'validation',
    batch_size: int = 32,
    max_examples: int | None = 512,
    length_norm: float = 1.0,
    parts: int = 1,
    averages: Sequence[str] = (),
    keep_best: str | None = None,
  ):
    """Makes the callback.

    Args:
      tasks: with choices, see `answers.add_choice_task`; each has a score.
      lengths: tokens of `inputs` and of every answer, `targets`.
      every: see `scoring.evaluate`.
      trained: what is trained on, which has numbered the tasks for adapters that
        tell them apart; others need none.
      split: which examples.
      batch_size: rows of a batch.
      max_examples: of each task, a fixed sample; None takes all.
      length_norm: as in training, see `choices.t_few`.
      parts: see `choices.rank`.
      averages: see `scoring.evaluate`.
      keep_best: likewise.
    """
    super().__init__(
      lambda params: {}, every=every, averages=averages, keep_best=keep_best
    )
    self._name = getattr(tasks, 'name', tasks)
    self._trained = getattr(trained, 'name', trained)
    self._length_norm, self._parts = length_norm, parts
    self._read = dict(
      lengths=lengths, batch_size=batch_size, split=split,
      kind='encoder_decoder', max_examples=max_examples, choices=True,
    )  # fmt: skip

  def on_start(self, run):
    super().on_start(run)
    read = self._read
    provider = stream.find(self._name, read['split'])
    family, data = run.family, {}
    reads = family.adapter.reads if isinstance(family, adapters.Adapted) else ()
    names = task_ids.names(provider)
    numbers = self._numbers(names) if reads else {}
    for task in names:
      data[task] = splits.batches(task, **read)
      if reads:
        rows = np.full(read['batch_size'], numbers[task], np.int32)
        told = dict.fromkeys(reads, rows)
        data[task] = [{**batch, **told} for batch in data[task]]
    self._fn = scoring.compiled(
      ranked_lib.rank_evaluator(
        family, data, length_norm=self._length_norm, parts=self._parts
      )
    )

  def _numbers(self, names):
    """`{task: its number in training}`.

    Raises:
      ConfigError: what is trained on is not told, or has not such a task.
    """
    if self._trained is None:
      raise errors.ConfigError(
        'The adapter tells tasks apart by numbers that the mixture which is '
        'trained on gave them: name it as `trained` '
        '(training_scores.ranked.trained).'
      )
    known = task_ids.names(stream.find(self._trained, 'train'))
    for name in names:
      if name not in known:
        raise errors.ConfigError(errors.near(name, known, 'task, of training,'))
    return {name: number for number, name in enumerate(known)}
