# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores a forest: seed, experts, dense model, merges and the ensemble."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import numpy as np

from mergejax import typing
from mergejax.evaluation import bits
from mergejax.evaluation import report
from mergejax.experts import branch
from mergejax.experts import forest
from mergejax.merging import arithmetic
from mergejax.merging import base as merging
from mergejax.merging import mean


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

  def merge(method, **options):
    return merging.merge(experts, method, **options)

  # Task arithmetic, its scale by validation.
  by_scale = {
    scale: merge(arithmetic.task_arithmetic(scale=scale), base=trained.seed)
    for scale in scales
  }
  on_validation = {
    scale: report.mean(scores(params, validation))
    for scale, params in by_scale.items()
  }
  scale = min(on_validation, key=on_validation.get)
  average_row = 'uniform average'
  arithmetic_row = f'task arithmetic, scale {scale:g}'
  merged = {average_row: merge(mean.linear()), arithmetic_row: by_scale[scale]}
  validation_mean = {
    average_row: report.mean(scores(merged[average_row], validation)),
    arithmetic_row: on_validation[scale],
  }
  best_merge = min(validation_mean, key=validation_mean.get)

  def likelihoods(one):
    return np.stack([scorer(params, one) for params in experts])

  rows = {}
  expert_lp = {domain: likelihoods(one) for domain, one in test.items()}
  priors = {
    domain: cached_prior(likelihoods(one), one.mask, batch_size)
    for domain, one in validation.items()
  }
  rows['seed'] = scores(trained.seed, test)
  names = {domain: f'expert {domain}' for domain in domains}
  for i, domain in enumerate(domains):
    rows[names[domain]] = {
      d: bits.score(expert_lp[d][i], one.num_bytes) for d, one in test.items()
    }
  rows['dense'] = scores(trained.dense, test)
  for name, params in merged.items():
    rows[name] = scores(params, test)
  rows['posterior average'] = {
    d: bits.score(
      scorer(merge(mean.linear(), weights=priors[d]), one), one.num_bytes
    )
    for d, one in test.items()
  }
  rows['ensemble'] = {
    d: bits.score(
      np.asarray(forest.ensemble(expert_lp[d], one.mask, priors[d])),
      one.num_bytes,
    )
    for d, one in test.items()
  }
  roles = report.Roles(
    seed='seed',
    dense='dense',
    ensemble='ensemble',
    experts=names,
    merges=tuple(merged),
    best_merge=best_merge,
  )
  chosen = {
    'task_arithmetic_scale': scale,
    'validation_mean_by_scale': {f'{s:g}': v for s, v in on_validation.items()},
    'best_merge': best_merge,
    'cached_priors': {d: p.tolist() for d, p in priors.items()},
  }
  return rows, roles, chosen, merged[best_merge]


def cached_prior(lp: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
  """The domain prior from the development sequences, batch by batch."""
  return forest.cached_prior(
    (lp[:, i : i + size], mask[i : i + size]) for i in range(0, len(mask), size)
  )
