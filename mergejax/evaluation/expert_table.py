# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of Branch-Train-Merge: seed, experts, dense, merges, ensemble."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax.core import typing
from mergejax.evaluation import base
from mergejax.evaluation import metrics
from mergejax.evaluation import report
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.merging import in_memory as merging
from mergejax.methods import arithmetic
from mergejax.methods import mean

Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Models:
  """Trained parameters, in host memory; experts have a leading axis K."""

  seed: Any
  experts: Any
  dense: Any


def evaluate(
  model: nn.Module | models.ModelFamily,
  trained: Models,
  *,
  validation: Mapping[str, Sequence[Batch]],
  test: Mapping[str, Sequence[Batch]],
  scales: Sequence[float],
  batch_size: int,
) -> tuple[base.Table, report.Roles, dict[str, Any], typing.Tree]:
  """Scores every model on every domain; choices are made on validation.

  Args:
    model: the language model, or its family.
    trained: seed, experts and dense model.
    validation: `{domain: batches}` for scales, the best merge and priors, with
      the bytes behind every row; from `Suite.read`.
    test: `{domain: batches}` for the table.
    scales: candidates for task arithmetic.
    batch_size: sequences between two updates of a domain's prior.

  Returns:
    `(table, roles, what was chosen, the best merge)`.
  """
  scorer = Scorer(model)
  experts = [branch.unstack(trained.experts, i) for i in range(len(test))]
  merged, best_merge, chosen = choose_merges(
    experts, trained.seed, scales,
    lambda params: _mean(scorer.scores(params, validation)),
  )  # fmt: skip
  priors = {
    domain: cached_prior(
      scorer.of_experts(experts, batches), scorer.mask(batches), batch_size
    )
    for domain, batches in validation.items()
  }
  names = {domain: f'expert {domain}' for domain in test}
  by_expert, mixed = _outputs(scorer, experts, names.values(), priors, test)
  table = base.Table({
    'seed': scorer.scores(trained.seed, test),
    **by_expert,
    'dense': scorer.scores(trained.dense, test),
    **{row: scorer.scores(params, test) for row, params in merged.items()},
    'posterior average': _posterior_average(scorer, experts, priors, test),
    'ensemble': mixed,
  })  # fmt: skip
  roles = report.Roles(
    seed='seed', dense='dense', ensemble='ensemble', experts=names,
    merges=tuple(merged), best_merge=best_merge,
  )  # fmt: skip
  chosen['cached_priors'] = {d: p.tolist() for d, p in priors.items()}
  return table, roles, chosen, merged[best_merge]


class Scorer:
  """Log-likelihoods of tokens under models of one architecture.

  Args:
    model: a module that a family knows, or the family.
  """

  def __init__(self, model: nn.Module | models.ModelFamily):
    self._family = models.family_of(model)
    self._scorer = metrics.make_scorer(self._family, 'bits_per_byte')

  def log_likelihood(
    self, params: typing.Tree, batches: Sequence[Batch]
  ) -> np.ndarray:
    """`<float32>[sequences, length]` in nats, 0 at padding."""
    nats, _ = self._scorer(params, batches)
    return -nats

  def of_experts(
    self, experts: Sequence[typing.Tree], batches: Sequence[Batch]
  ) -> np.ndarray:
    """`<float32>[K, sequences, length]`."""
    return np.stack([self.log_likelihood(one, batches) for one in experts])

  def mask(self, batches: Sequence[Batch]) -> np.ndarray:
    """`<bool>[sequences, length]`, True on tokens that count."""
    return np.concatenate(
      [np.asarray(self._family.target_weights(b)) > 0 for b in batches]
    )

  def scores(
    self, params: typing.Tree, sets: Mapping[str, Sequence[Batch]]
  ) -> dict[str, base.Score]:
    """`{domain: Score}` of one model."""
    return {
      domain: score(self.log_likelihood(params, batches), batches)
      for domain, batches in sets.items()
    }


def score(log_likelihood: np.ndarray, batches: Sequence[Batch]) -> base.Score:
  """Bits per byte of `<float>[sequences, length]` nats, 0 at padding."""
  num_bytes = np.concatenate([batch['num_bytes'] for batch in batches])
  return metrics.score(-log_likelihood, num_bytes, 'bits_per_byte')


def _mean(scores):
  return float(np.mean([score.value for score in scores.values()]))


def _outputs(scorer, experts, names, priors, test):
  """`({row of an expert: scores}, scores of their mixture of outputs)`."""
  rows, mixed = {name: {} for name in names}, {}
  for domain, batches in test.items():
    lp = scorer.of_experts(experts, batches)
    for name, expert_lp in zip(rows, lp):
      rows[name][domain] = score(expert_lp, batches)
    mixture = ensemble.log_likelihood(lp, scorer.mask(batches), priors[domain])
    mixed[domain] = score(np.asarray(mixture), batches)
  return rows, mixed


def _posterior_average(scorer, experts, priors, test):
  """Scores of weight averages, one for each domain, by its prior."""
  average = jax.jit(
    lambda trees, weights: merging.merge(trees, mean.linear(), weights=weights)
  )
  return {
    domain: score(
      scorer.log_likelihood(average(experts, priors[domain]), batches), batches
    )
    for domain, batches in test.items()
  }


def choose_merges(
  experts: Sequence[typing.Tree],
  seed: typing.Tree,
  scales: Sequence[float],
  validation_mean: Callable[[typing.Tree], float],
) -> tuple[dict[str, typing.Tree], str, dict[str, Any]]:
  """Merges experts into single models; scale and best are by validation.

  Args:
    experts: the experts' parameters.
    seed: the model they branched from.
    scales: candidates for task arithmetic.
    validation_mean: bits per byte of a model, mean over domains.

  Returns:
    `({row: parameters}, the best row, what was chosen)`.
  """

  @jax.jit  # one program for all scales
  def at_scale(experts, seed, scale):
    method = arithmetic.task_arithmetic(scale=scale)
    return merging.merge(experts, method, base=seed)

  by_scale = {}
  for scale in scales:
    params = at_scale(experts, seed, scale)
    by_scale[scale] = (validation_mean(params), params)
  scale = min(by_scale, key=lambda s: by_scale[s][0])
  average = merging.merge(experts, mean.linear())
  rows = {
    'uniform average': (validation_mean(average), average),
    f'task arithmetic, scale {scale:g}': by_scale[scale],
  }
  best = min(rows, key=lambda row: rows[row][0])
  chosen = {
    'task_arithmetic_scale': scale,
    'validation_mean_by_scale': {f'{s:g}': v[0] for s, v in by_scale.items()},
    'best_merge': best,
  }
  return {row: params for row, (_, params) in rows.items()}, best, chosen


def cached_prior(lp: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
  """The domain prior from the development sequences, batch by batch."""
  return ensemble.cached_prior(
    (lp[:, i : i + size], mask[i : i + size]) for i in range(0, len(mask), size)
  )
