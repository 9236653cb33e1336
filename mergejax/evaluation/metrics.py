# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a suite can measure, example by example, and the scores of that.

Every metric is a ratio of two sums over examples: hits over examples, nats over
tokens, bits over bytes. So it has a bootstrap interval, and padding, which adds
nothing to either, does not count.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import base
from mergejax.training import batches as batches_lib
from mergejax.training import losses

ACCURACY = base.Metric('accuracy')
LOSS = base.Metric('loss', higher_is_better=False)
BITS_PER_BYTE = base.Metric('bits_per_byte', higher_is_better=False)
METRICS = {m.name: m for m in (ACCURACY, LOSS, BITS_PER_BYTE)}

# What positions are measured in, in nats or hits.
_UNITS = {'bits_per_byte': np.log(2)}

# (params, batches) -> (values [examples, positions], counts [examples])
Scorer = Callable[
  [typing.Tree, Sequence[Mapping[str, Any]]], tuple[np.ndarray, np.ndarray]
]


def position_scores(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  metric: str,
) -> tuple[jax.Array, jax.Array]:
  """What every position of a batch adds to a metric; traceable.

  Args:
    model: a module that a family knows, or the family.
    params: of the model.
    batch: what the family takes; `num_bytes <int>[batch]` for bits per byte.
    metric: a name of `METRICS`.

  Returns:
    `(<float32>[batch, positions], <float32>[batch])`: nats of every target
    token, over tokens or bytes; or, of 'accuracy', one position: whether the
    whole answer is right (every target token is the most likely one after those
    before it, which is what greedy decoding says), over 1. All are 0 where
    nothing counts.

  Raises:
    DataError: bits per byte of a batch that does not tell its bytes.
  """
  family = models.family_of(model)
  logits = family.logits(params, batch)
  flat = lambda x: x.reshape(x.shape[0], -1)
  targets = jnp.asarray(family.targets(batch), jnp.int32)
  weights = flat(family.target_weights(batch))
  if metric == ACCURACY.name:
    right = flat(jnp.argmax(logits, axis=-1) == targets) | (weights == 0)
    real = (jnp.max(weights, axis=1) > 0).astype(jnp.float32)
    hits = jnp.all(right, axis=1).astype(jnp.float32) * real
    return hits[:, None], real
  loss, _ = losses.token_cross_entropy(logits, targets)
  nats = flat(loss) * weights
  if metric == LOSS.name:
    return nats, jnp.sum(weights, axis=1)
  if 'num_bytes' not in batch:
    raise errors.DataError(
      'Nothing tells how many bytes of text these tokens stand for: bits per '
      'byte need tasks of tasks.add_text_task, with bytes or a SentencePiece '
      'model.'
    )
  return nats, jnp.asarray(batch['num_bytes'], jnp.float32)


def example_scores(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  metric: str,
) -> tuple[jax.Array, jax.Array]:
  """`(numerators, denominators)`, <float32>[batch] each, of one batch."""
  values, counts = position_scores(model, params, batch, metric)
  return jnp.sum(values, axis=1) / _UNITS.get(metric, 1.0), counts


def make_scorer(
  model: nn.Module | models.ModelFamily,
  metric: str,
  mesh: jax.sharding.Mesh | None = None,
) -> Scorer:
  """A function that scores batches, compiled once for all parameters.

  Args:
    model: a module that a family knows, or the family.
    metric: a name of `METRICS`.
    mesh: where the parameters lie, if that is several devices: the rows of a
      batch are spread over its `data`.

  Returns:
    `scorer(params, batches)`: `position_scores` of all rows, in host memory. Of
    'bits_per_byte' and 'loss' the negative values are the log-likelihoods of
    the tokens. It raises a `DataError` for tokens or classes that the model
    does not have.
  """
  family = models.family_of(model)
  compiled = jax.jit(lambda p, batch: position_scores(family, p, batch, metric))

  def run(params, batch):
    if mesh is None:
      return jax.device_get(compiled(params, dict(batch)))
    with partition.rules_of(mesh, partition.standard()):
      return partition.to_host(
        compiled(params, batches_lib.on_mesh(mesh, batch))
      )

  def scorer(params, batches):
    for batch in batches:
      family.check_batch(batch, 'the test set')
    params = jax.device_put(params) if mesh is None else params
    values, counts = zip(*[run(params, batch) for batch in batches])
    return np.concatenate(values), np.concatenate(counts)

  return scorer


def score(
  values: np.ndarray,
  counts: np.ndarray,
  metric: str,
  *,
  resamples: int = 1000,
) -> base.Score:
  """A metric of all examples: `sum values / sum counts`, with its interval.

  Bits per byte are `-sum log2 p(token) / bytes`: the end-of-document token is
  paid for but is no byte.

  Args:
    values: `<float>[examples, positions]`, see `position_scores`.
    counts: `<number>[examples]`, likewise.
    metric: a name of `METRICS`.
    resamples: see `bootstrap`.

  Raises:
    DataError: there is no example.

  Example:
    >>> score(np.log(np.full((4, 8), 2)), np.full(4, 8), 'bits_per_byte').value
    1.0
  """
  # One value a row in float64: a sum over a whole test set keeps its digits.
  totals = np.sum(values, axis=-1, dtype=np.float64) / _UNITS.get(metric, 1.0)
  return bootstrap(totals, counts, METRICS[metric], resamples=resamples)


def bootstrap(
  numerators: np.ndarray,
  denominators: np.ndarray,
  metric: base.Metric,
  *,
  resamples: int = 1000,
) -> base.Score:
  """`sum numerators / sum denominators` over examples, with its interval.

  Args:
    numerators: <float>[examples], hits or bits.
    denominators: <float>[examples], ones or bytes. An example with 0 of both
      fills a batch and does not count.
    metric: what is measured.
    resamples: bootstrap samples of examples, drawn with a fixed seed.

  Returns:
    The ratio and the 2.5% and 97.5% quantiles of its bootstrap distribution.

  Raises:
    DataError: no example.

  Example:
    >>> bootstrap(np.ones(4), np.ones(4), ACCURACY).low
    1.0
  """
  up = np.asarray(numerators, np.float64)
  down = np.asarray(denominators, np.float64)
  real = (up != 0) | (down != 0)
  up, down = up[real], down[real]
  if not len(up) or not down.sum():
    raise errors.DataError('There is no example to score.')
  picks = np.random.default_rng(0).integers(0, len(up), (resamples, len(up)))
  tops, bottoms = up[picks].sum(axis=1), down[picks].sum(axis=1)
  there = bottoms > 0  # a sample of ends of documents alone has no ratio
  ratios = tops[there] / bottoms[there]
  low, high = np.quantile(ratios, [0.025, 0.975])
  value = float(up.sum() / down.sum())
  return base.Score(value, float(low), float(high), metric)
