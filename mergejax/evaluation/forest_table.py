# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores a forest: seed, experts, dense model, merges and the ensemble."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from mergejax.core import typing
from mergejax.evaluation import bits
from mergejax.evaluation import report
from mergejax.experts import branch
from mergejax.experts import forest
from mergejax.merging import in_memory as merging
from mergejax.methods import arithmetic
from mergejax.methods import mean


@dataclasses.dataclass(frozen=True)
class Models:
  """Trained parameters, in host memory; experts have a leading axis K."""

  seed: Any
  experts: Any
  dense: Any


def evaluate(
  module: nn.Module,
  trained: Models,
  *,
  validation: Mapping[str, bits.TestSet],
  test: Mapping[str, bits.TestSet],
  scales: Sequence[float],
  batch_size: int,
) -> tuple[
  dict[str, dict[str, bits.Score]], report.Roles, dict[str, Any], typing.Tree
]:
  """Scores every model on every domain; choices are made on validation.

  Args:
    module: the language model.
    trained: seed, experts and dense model.
    validation: `{domain: sequences}` for scales, the best merge and priors.
    test: `{domain: sequences}` for the table.
    scales: candidates for task arithmetic.
    batch_size: sequences between two updates of a domain's prior.

  Returns:
    `(table, roles, what was chosen, the best merge)`.
  """
  domains = list(test)
  scorer = bits.make_scorer(module)
  experts = [branch.unstack(trained.experts, i) for i in range(len(domains))]

  def scores(params, sets):
    return {
      d: bits.score(scorer(params, one), one.num_bytes)
      for d, one in sets.items()
    }

  def likelihoods(one):
    return np.stack([scorer(params, one) for params in experts])

  merged, best_merge, chosen = choose_merges(
    experts,
    trained.seed,
    scales,
    lambda params: report.mean(scores(params, validation)),
  )
  priors = {
    d: cached_prior(likelihoods(one), one.mask, batch_size)
    for d, one in validation.items()
  }
  expert_lp = {d: likelihoods(one) for d, one in test.items()}

  def rows_of(log_likelihood):
    return {
      d: bits.score(log_likelihood(d, one), one.num_bytes)
      for d, one in test.items()
    }

  weighted_average = jax.jit(
    lambda models, weights: merging.merge(
      models, mean.linear(), weights=weights
    )
  )

  def posterior_average(domain, one):
    return scorer(weighted_average(experts, priors[domain]), one)

  def ensemble(domain, one):
    mixed = forest.ensemble(expert_lp[domain], one.mask, priors[domain])
    return np.asarray(mixed)

  names = {domain: f'expert {domain}' for domain in domains}
  table = {'seed': scores(trained.seed, test)}
  for i, domain in enumerate(domains):
    table[names[domain]] = rows_of(lambda d, _, i=i: expert_lp[d][i])
  table['dense'] = scores(trained.dense, test)
  for name, params in merged.items():
    table[name] = scores(params, test)
  table['posterior average'] = rows_of(posterior_average)
  table['ensemble'] = rows_of(ensemble)
  roles = report.Roles(
    seed='seed',
    dense='dense',
    ensemble='ensemble',
    experts=names,
    merges=tuple(merged),
    best_merge=best_merge,
  )
  chosen['cached_priors'] = {d: p.tolist() for d, p in priors.items()}
  return table, roles, chosen, merged[best_merge]


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
  return forest.cached_prior(
    (lp[:, i : i + size], mask[i : i + size]) for i in range(0, len(mask), size)
  )
