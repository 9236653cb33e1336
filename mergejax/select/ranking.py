# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Many models, many tasks, one table of scores."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.select import bayes
from mergejax.select import features
from mergejax.select import transfer

SCORES = ('logme', 'h_score', 'leep', 'nce')


def classes_of(
  batches: Iterable[Mapping[str, Any]],
  module: nn.Module | models.ModelFamily | None = None,
) -> np.ndarray:
  """`<int64>[examples]` classes: labels, or distinct whole answers of text.

  Answers are numbered in the order of their tokens, so that the numbers do not
  depend on which examples come first. The family of `module` says what targets
  are; without one, the names of the batches.
  """
  answers = []
  for batch in batches:
    family = models.family_for(module, batch)
    real = np.asarray(family.real_rows(batch))
    targets = np.asarray(family.targets(batch))[real]
    if targets.ndim == 1:
      answers += targets.tolist()
      continue
    # A prompt that stands before an answer is no part of it.
    said = np.asarray(family.given_weights(batch))[real] > 0
    answers += [tuple(row[own].tolist()) for row, own in zip(targets, said)]
  if not answers:
    raise errors.DataError('There was no batch to take labels of.')
  if not isinstance(answers[0], tuple):
    return np.asarray(answers, np.int64)
  numbers = {answer: i for i, answer in enumerate(sorted(set(answers)))}
  return np.array([numbers[answer] for answer in answers], np.int64)


def rank(
  rows: Iterable[tuple[str, nn.Module | models.ModelFamily, typing.Tree]],
  tasks: Mapping[str, Sequence[Mapping[str, Any]]],
  *,
  score: str = 'logme',
  progress: Any = lambda model, task: None,
) -> dict[str, dict[str, float]]:
  """Scores every model for every task, without training.

  Args:
    rows: `(name, module or family, params)`, which may come one by one.
    tasks: `{task: batches}`, some hundreds of examples each.
    score: 'logme' or 'h_score' of the features (see `features.extract`); 'leep'
      or 'nce' of the model's own answers: classes of an image classifier, or
      the most likely first token of text.
    progress: called with model and task.

  Returns:
    `{model: {task: score}}`, higher is better; comparable within a task.

  Raises:
    UserError: an unknown score, a task with fewer than two classes, a model
      whose features or answers are not finite (it is named).
  """
  if score not in SCORES:
    raise errors.ConfigError(errors.near(score, SCORES, 'ranking score'))
  labels, result = {}, {}
  for name, module, params in rows:
    # What targets are is for the first model's family to say.
    labels = labels or _labels(module, tasks)
    result[name] = {}
    params = jax.device_put(params)
    for task, batches in tasks.items():
      progress(name, task)
      try:
        found = _score(module, params, batches, labels[task], score)
      except errors.UserError as error:
        raise error.at(f'{name}, {task}') from error
      result[name][task] = found
  return result


def _labels(module, tasks):
  """`{task: classes of its examples}`."""
  labels = {
    task: classes_of(batches, module) for task, batches in tasks.items()
  }
  for task, classes in labels.items():
    if len(np.unique(classes)) < 2:
      raise errors.DataError(
        f'All examples of {task} have one answer: there is nothing to rank by.'
      )
  return labels


def _score(module, params, batches, labels, score):
  if score in ('logme', 'h_score'):
    found = features.extract(module, params, batches)
    if score == 'logme':
      return bayes.logme(found, labels)
    return transfer.h_score(found, labels)
  given = source_probabilities(module, params, batches)
  if score == 'leep':
    return transfer.leep(given, labels)
  return transfer.nce(given.argmax(axis=1), labels)


def source_probabilities(
  module: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
) -> np.ndarray:
  """`<float64>[examples, classes]`, what a model answers in its own classes.

  For text, the distribution of the first target token.
  """

  @jax.jit
  def one(params, batch):
    family = models.family_for(module, batch)
    logits = family.logits(params, batch)
    if logits.ndim == 3:  # a prompt may stand before the answer
      first = jnp.argmax(family.given_weights(batch) > 0, axis=1)
      logits = jnp.take_along_axis(logits, first[:, None, None], axis=1)[:, 0]
    return jax.nn.softmax(logits)

  rows = []
  for batch in batches:
    real = np.asarray(models.family_for(module, batch).real_rows(batch))
    rows.append(np.asarray(one(params, dict(batch)), np.float64)[real])
  given = np.concatenate(rows)
  undefined = int((~np.isfinite(given)).any(axis=1).sum())
  if undefined:
    raise errors.DataError(
      f'Of {len(given)} examples {undefined} have answers that are not finite: '
      'the model is broken, or the data is.'
    )
  return given
