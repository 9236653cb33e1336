# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of language models on a test set, with a bootstrap interval."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import seqio

from mergejax import models
from mergejax import typing
from mergejax.data import stream
from mergejax.train import losses


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


def make_test_set(
  batches: Sequence[dict[str, np.ndarray]], vocabulary: seqio.Vocabulary
) -> TestSet:
  """Counts the bytes behind every sequence; the end token has none."""
  counts = []
  for batch in batches:
    for row in batch['decoder_target_tokens']:
      if isinstance(vocabulary, seqio.ByteVocabulary):
        counts.append(int((row >= 3).sum()))  # after padding, end, unknown
      else:
        text = vocabulary.decode([int(token) for token in row if token > 0])
        counts.append(len(text.encode('utf-8')))
  return TestSet(batches, np.asarray(counts, np.int64))


def load_test_sets(
  task_of: Mapping[str, str],
  vocabulary: seqio.Vocabulary,
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
      ),
      vocabulary,
    )
    for domain, task in task_of.items()
  }


def make_scorer(
  module: nn.Module,
) -> Callable[[typing.Tree, TestSet], np.ndarray]:
  """A function that scores a test set, compiled once for all models.

  Returns:
    `scorer(params, test_set) -> <float32>[sequences, length]`, the
    log-likelihood of every token in nats, 0 where the weight is 0.
  """

  @jax.jit
  def one(params: Any, batch: dict[str, Any]):
    lp = losses.token_log_likelihood(module, params, batch)
    return lp * models.target_weights(batch)

  def scorer(params, test_set):
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
    num_bytes: `<int>[sequences]`.
    resamples: bootstrap samples of sequences, drawn with a fixed seed.

  Returns:
    The ratio and the 2.5% and 97.5% quantiles of its bootstrap distribution.

  Example:
    >>> score(np.log(np.full((4, 8), 0.5)), np.full(4, 8)).bits_per_byte
    1.0
  """
  bits = -log_likelihood.sum(axis=-1, dtype=np.float64) / np.log(2)
  rng = np.random.default_rng(0)
  picks = rng.integers(0, len(bits), (resamples, len(bits)))
  ratios = bits[picks].sum(axis=1) / num_bytes[picks].sum(axis=1)
  low, high = np.quantile(ratios, [0.025, 0.975])
  total = bits.sum() / num_bytes.sum()
  return Score(float(total), float(low), float(high))
