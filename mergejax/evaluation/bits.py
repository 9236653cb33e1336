# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of language models on a test set, with a bootstrap interval."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.data import stream
from mergejax.evaluation import scores
from mergejax.training import losses


@dataclasses.dataclass(frozen=True)
class Score:
  """Bits per byte and its 95% bootstrap interval."""

  bits_per_byte: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class TestSet:
  """A test set in batches, with the bytes of every sequence.

  Attributes:
    batches: arrays of equal shape, see `stream.evaluation_batches`.
    num_bytes: `<int64>[sequences]`, UTF-8 bytes behind each row's tokens.
  """

  batches: Sequence[dict[str, np.ndarray]]
  num_bytes: np.ndarray

  @property
  def mask(self) -> np.ndarray:
    """`<bool>[sequences, length]`, True on tokens that count."""
    rows = [np.asarray(models.target_weights(b)) > 0 for b in self.batches]
    return np.concatenate(rows)


def make_test_set(batches: Sequence[dict[str, np.ndarray]]) -> TestSet:
  """The bytes behind every sequence, as they were counted in tokenising.

  Args:
    batches: of a text task, with `num_bytes <int>[rows]`.

  Raises:
    UserError: nothing tells the bytes, because of the vocabulary.
  """
  if any('num_bytes' not in batch for batch in batches):
    raise errors.DataError(
      'Nothing tells how many bytes of text these tokens stand for: bits per '
      'byte need tasks of tasks.add_text_task, with bytes or a SentencePiece '
      'model.'
    )
  counts = [np.asarray(batch['num_bytes'], np.int64) for batch in batches]
  return TestSet(batches, np.concatenate(counts))


def load_test_sets(
  task_of: Mapping[str, str],
  *,
  split: str,
  length: int,
  batch_size: int,
  max_sequences: int,
) -> dict[str, TestSet]:
  """A fixed sample of a split of every domain: `{domain: TestSet}`."""
  return {
    domain: make_test_set(
      stream.evaluation_batches(
        task,
        lengths={'targets': length},
        batch_size=batch_size,
        split=split,
        max_examples=max_sequences,
      )
    )
    for domain, task in task_of.items()
  }


def make_scorer(
  module: nn.Module,
) -> Callable[[typing.Tree, TestSet], np.ndarray]:
  """A function that scores a test set, compiled once for all models.

  Returns:
    `scorer(params, test_set) -> <float32>[sequences, length]`, the
    log-likelihood of every token in nats, 0 where the weight is 0. It raises a
    `UserError` for tokens that the model does not have.
  """

  @jax.jit
  def one(params: Any, batch: dict[str, Any]):
    lp = losses.token_log_likelihood(module, params, batch)
    return lp * models.target_weights(batch)

  def scorer(params, test_set):
    for batch in test_set.batches:
      models.check_batch(module, batch, 'the test set')
    params = jax.device_put(params)
    return np.concatenate(
      [np.asarray(one(params, batch)) for batch in test_set.batches]
    )

  return scorer


def score(
  log_likelihood: np.ndarray,
  num_bytes: np.ndarray,
  *,
  resamples: int = 1000,
) -> Score:
  """Bits per byte: `-sum log2 p(token) / bytes`, over all sequences.

  The end-of-document token is paid for but is no byte.

  Args:
    log_likelihood: `<float>[sequences, length]` in nats, 0 at padding.
    num_bytes: `<int>[sequences]`. Sequences of padding alone do not count.
    resamples: bootstrap samples of sequences, drawn with a fixed seed.

  Returns:
    The ratio and the 2.5% and 97.5% quantiles of its bootstrap distribution.

  Raises:
    UserError: there is no text.

  Example:
    >>> score(np.log(np.full((4, 8), 0.5)), np.full(4, 8)).bits_per_byte
    1.0
  """
  bits = -log_likelihood.sum(axis=-1, dtype=np.float64) / np.log(2)
  found = scores.bootstrap(bits, num_bytes, resamples=resamples)
  return Score(found.value, found.low, found.high)
