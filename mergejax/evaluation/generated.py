# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of generated text: exact match, and seqio's metric functions.

A model answers, greedily or as `decode` is told; its vocabulary turns the
tokens into text, the task's `postprocess_fn` turns that into what its
`metric_fns` compare: `fn(targets, predictions)`. Those of the form `fn(targets,
scores)` get the log-likelihood of every target, in nats, instead.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import numbers
from typing import Any

import jax
import numpy as np
import seqio

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.data import samples
from mergejax.data import splits
from mergejax.data import stream
from mergejax.evaluation import base
from mergejax.evaluation import decode
from mergejax.evaluation import metrics
from mergejax.evaluation import positions
from mergejax.evaluation import texts

EXACT_MATCH = base.Metric('exact_match')
NAMES = ('exact_match', 'seqio')
# Metric functions are plain Python, and may be slow.
_RESAMPLES = 200


@dataclasses.dataclass
class Generated:
  """How a task is scored by what models say.

  Attributes:
    task: seqio's name of the task.
    split: the split to score on.
    lengths: tokens of `inputs` and `targets`; of an answer, that of `targets`.
    max_examples: a fixed sample of so many; None takes all.
    lower_is_better: numbers of the metric functions of which less is better.
    decoding: options of a way to decode, see `decode.method_of`, and the `seed`
      of its draws; greedy without any.
    mesh: what rows are spread over, see `decode.make_decoder`.
  """

  task: str
  split: str
  lengths: Mapping[str, int]
  max_examples: int | None
  lower_is_better: Sequence[str] = ()
  decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mesh: jax.sharding.Mesh | None = None
  # Compiled once for all models of a module.
  _decoders: dict[Any, Any] = dataclasses.field(default_factory=dict)
  _scorers: dict[Any, Any] = dataclasses.field(default_factory=dict)

  @property
  def provider(self) -> seqio.Task:
    """The task as seqio has it."""
    return seqio.TaskRegistry.get(self.task)

  @functools.cached_property
  def examples(self) -> list[dict[str, Any]]:
    """The examples behind the rows of the batches, in their order."""
    provider = stream.find(self.task, self.split)
    if self.max_examples is not None:
      provider = samples.narrowed(provider, self.split, self.max_examples)
    dataset = splits.in_order(provider, self.split, self.lengths)
    found = list(dataset.as_numpy_iterator())
    if self.max_examples is None:
      return found
    return [found[i] for i in samples.numbers(len(found), self.max_examples)]

  def predictions(
    self,
    model: Any,
    params: typing.Tree,
    batches: Sequence[Mapping[str, Any]],
  ) -> list[str]:
    """What a model says to every example.

    Args:
      model: a module whose family decodes, or the family.
      params: of the model.
      batches: of the task, from `Suite.batches`.
    """
    family = models.family_of(model)
    method, seed = parse_decoding(self.decoding)
    if family.program_key not in self._decoders:
      self._decoders[family.program_key] = decode.make_decoder(
        family, length=self.lengths['targets'], method=method, mesh=self.mesh
      )
    decoder = self._decoders[family.program_key]
    key = jax.random.key(seed) if method.draws else None
    said, count = [], 0
    for batch in batches:
      real = np.asarray(family.real_rows(batch))
      rows = np.arange(count, count + len(real), dtype=np.int32)
      answers = decoder(params, batch, key=key, rows=rows)
      said += [self._text(row) for row in answers[real]]
      count += len(real)
    return said

  def _text(self, tokens):
    vocabulary = self.provider.output_features['targets'].vocabulary
    return texts.decoded(vocabulary, tokens)

  def exact_match(
    self,
    model: Any,
    params: typing.Tree,
    batches: Sequence[Mapping[str, Any]],
  ) -> base.Score:
    """Share of the examples whose generated text is that of the target."""
    said = self.predictions(model, params, batches)
    wanted = [self._text(example['targets']) for example in self.examples]
    hits = np.array([a == b for a, b in zip(said, wanted, strict=True)], float)
    return metrics.bootstrap(hits, np.ones(len(hits)), EXACT_MATCH)

  def scores(
    self,
    model: Any,
    params: typing.Tree,
    batches: Sequence[Mapping[str, Any]],
  ) -> dict[str, base.Score]:
    """`{number: Score}` of all numbers that the task's metric functions return.

    The interval of a number is that of 200 bootstrap samples of examples.
    """
    task = self.provider
    check_functions(task)
    post = functools.partial(_processed, task)
    targets = [post(x, self._target(x), True) for x in self.examples]
    found = {}
    if task.predict_metric_fns:
      said = self.predictions(model, params, batches)
      told = [post(x, s, False) for x, s in zip(self.examples, said, strict=True)]  # fmt: skip
      for function in task.predict_metric_fns:
        found |= self._numbers(function, targets, told)
    if task.score_metric_fns:
      log_p = self._log_likelihoods(models.family_of(model), params, batches)
      for function in task.score_metric_fns:
        found |= self._numbers(function, targets, log_p)
    if not found:
      raise errors.DataError(
        f'The metric functions of {self.task} return no number.'
      )
    return found

  def _log_likelihoods(self, family, params, batches):
    """Of the target of every example, in nats."""
    if family.program_key not in self._scorers:
      self._scorers[family.program_key] = metrics.make_scorer(
        family, 'loss', self.mesh
      )
    nats, _ = self._scorers[family.program_key](params, batches)
    real = np.concatenate([family.real_rows(batch) for batch in batches])
    sums = np.asarray(np.sum(nats, axis=1, dtype=np.float64))
    return (-sums[real]).tolist()

  def _target(self, example):
    text = example.get('targets_pretokenized')
    if text is None:
      return self._text(example['targets'])
    return text.decode('utf-8') if isinstance(text, bytes) else str(text)

  def _numbers(self, function, targets, outputs):
    """What a metric function returns, with bootstrap intervals."""
    whole = _plain_numbers(function(targets, outputs))
    rng = np.random.default_rng(0)
    drawn = {name: [] for name in whole}
    for _ in range(_RESAMPLES):
      picks = rng.integers(0, len(targets), len(targets))
      try:
        again = _plain_numbers(
          function([targets[i] for i in picks], [outputs[i] for i in picks])
        )
      except (ValueError, ZeroDivisionError):
        continue  # a sample of one class alone has no such number
      for name in whole:
        drawn[name].append(again.get(name, whole[name]))
    result = {}
    for name, value in whole.items():
      low, high = np.quantile(drawn[name] or [value], [0.025, 0.975])
      metric = base.Metric(name, name not in self.lower_is_better)
      result[name] = base.Score(value, float(low), float(high), metric)
    return result


def parse_decoding(
  words: Mapping[str, Any],
) -> tuple[positions.Method, int]:
  """`(method, seed)` of the options under a suite's `decoding`.

  Raises:
    ConfigError: see `decode.method_and_seed`; or several samples.
  """
  if 'samples' in words:
    raise errors.ConfigError(
      'decoding: one answer to an example is scored, so there are no samples. '
      'Leave it out; `mergejax infer --samples` writes several.'
    )
  return decode.method_and_seed(words)


def check_functions(task: seqio.Task) -> None:
  """Raises if a task has no metric function that can be called here.

  Raises:
    ConfigError: no metric functions, or some that want more than predictions.
  """
  if not task.predict_metric_fns and not task.score_metric_fns:
    raise errors.ConfigError(
      f'The task {task.name} has no metric_fns of (targets, predictions) or '
      "(targets, scores), which 'metric: seqio' calls: register it with some, "
      "or score 'exact_match' or 'accuracy'."
    )
  if task.predict_with_aux_metric_fns:
    raise errors.ConfigError(
      f'The task {task.name} has metric_fns with aux_values, which '
      'decoding does not give: register it without them.'
    )


def _processed(task, example, text, is_target):
  return task.postprocess_fn(text, example=example, is_target=is_target)


def _plain_numbers(found):
  """The numbers among what a metric function returns."""
  result = {}
  for name, value in found.items():
    value = getattr(value, 'value', value)  # of a seqio.metrics.Scalar
    if isinstance(value, numbers.Number) or np.shape(value) == ():
      if not isinstance(value, (str, bytes)):
        result[name] = float(np.asarray(value))
  return result
