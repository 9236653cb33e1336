# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of a forest: its experts, their ensembles, and averages of weights.

Experts are read one after the other, so that a forest may be larger than the
memory: of each, only the log-likelihoods of the tokens stay.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import base
from mergejax.evaluation import expert_table
from mergejax.experts import averages
from mergejax.experts import ensemble
from mergejax.experts import forest as forest_lib

Sets = Mapping[str, Sequence[Mapping[str, Any]]]

# How outputs are mixed; those of the second line need a prior of the domain.
ENSEMBLES = (
  'uniform', 'simple_average', 'updating',
  'cached', 'argmax', 'topk',
)  # fmt: skip
_BY_PRIOR = ('cached', 'argmax', 'topk')


def likelihoods(
  forest: forest_lib.Forest,
  sets: Sets,
  scorer: expert_table.Scorer,
  names: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
  """`{domain: <float32>[K, sequences, length]}` of the tokens under experts.

  Args:
    forest: whose experts are asked.
    sets: `{domain: batches}`.
    scorer: of its module.
    names: of experts; all by default, in their order.

  Raises:
    ConfigError: there is no expert.
  """
  names = forest.names() if names is None else list(names)
  found: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
  for name in names:
    params = forest.params(name)
    for domain, batches in sets.items():
      found[domain].append(scorer.log_likelihood(params, batches))
  return {domain: np.stack(lps) for domain, lps in found.items()}


def priors(
  forest: forest_lib.Forest,
  sets: Sets,
  scorer: expert_table.Scorer,
  *,
  batch_size: int,
) -> dict[str, np.ndarray]:
  """`{domain: <float64>[K]}`: the cached prior of each, from held-out text."""
  found = likelihoods(forest, sets, scorer)
  return {
    domain: expert_table.cached_prior(lp, scorer.mask(sets[domain]), batch_size)
    for domain, lp in found.items()
  }


def check_mode(
  mode: str, prior: typing.Array | None, domain: str, k: int | None
) -> None:
  """Raises a `ConfigError` for a mode that is none, or lacks what it needs."""
  if mode not in ENSEMBLES:
    raise errors.ConfigError(errors.near(mode, ENSEMBLES, 'ensemble'))
  if mode in _BY_PRIOR and prior is None:
    raise errors.ConfigError(
      f'The ensemble {mode!r} goes by a prior, and none of {domain} is known: '
      'estimate it on held-out text (`mergejax forest update`), or take '
      "'updating', which learns one as it goes."
    )
  if mode == 'topk':
    if k is None:
      raise errors.ConfigError(
        "The ensemble 'topk' needs the number of experts that are kept."
      )
    errors.check_whole('top-k', k)


def mixed(
  lp: np.ndarray,
  mask: np.ndarray,
  mode: str,
  *,
  prior: typing.Array | None = None,
  k: int | None = None,
  batch_size: int = 32,
  posterior: ensemble.Posterior = ensemble.Posterior(),
  domain: str = 'the domain',
) -> np.ndarray:
  """Log-likelihoods of the tokens under an ensemble of experts.

  Args:
    lp: `<float32>[K, sequences, length]`.
    mask: `<bool>[sequences, length]`.
    mode: 'uniform' and 'cached': that prior, then the posterior of the text;
      'updating': a prior that is learnt batch by batch; 'argmax' and 'topk':
      the most likely experts of the cached prior alone; 'simple_average': 1/K
      always.
    prior: `[K]` cached, for those that need one.
    k: for 'topk'.
    batch_size: sequences between two updates of a prior.
    posterior: how weights follow the tokens.
    domain: for messages.

  Returns:
    `<float32>[sequences, length]`; 0 at padding.

  Raises:
    ConfigError: see `check_mode`.
  """
  check_mode(mode, prior, domain, k)
  how: dict[str, Any] = dict(
    kind=posterior.kind, tempering=posterior.tempering, floor=posterior.floor
  )
  if mode == 'updating':
    parts = (
      (lp[:, i : i + batch_size], mask[i : i + batch_size])
      for i in range(0, len(mask), batch_size)
    )
    scored = [one for _, one in ensemble.updating(parts, **how)]
    return np.concatenate([np.asarray(one) for one in scored])
  if mode == 'simple_average':
    how['kind'] = 'simple_average'
  if mode in ('uniform', 'simple_average'):
    prior = None
  if mode in ('argmax', 'topk'):
    kept = 1 if mode == 'argmax' else k or 1
    prior = ensemble.keep_top(np.asarray(prior), kept)
  return np.asarray(ensemble.log_likelihood(lp, mask, prior, **how))


def routed(
  lp: np.ndarray, mask: np.ndarray, weights: np.ndarray, context: int
) -> np.ndarray:
  """Log-likelihoods under experts that a router chose by the first tokens.

  Args:
    lp: `<float32>[K, sequences, length]`.
    mask: `<bool>[sequences, length]`.
    weights: `<float>[sequences, K]` of each row, by its first tokens.
    context: how many these are; they themselves are mixed uniformly.

  Returns:
    `<float32>[sequences, length]`; 0 at padding.
  """
  first = ensemble.log_likelihood(lp, mask, kind='simple_average')
  then = ensemble.log_likelihood(lp, mask, weights.T, kind='fixed')
  return np.where(np.arange(lp.shape[-1]) < context, first, then)


def table(
  forest: forest_lib.Forest,
  sets: Sets,
  *,
  ensembles: Sequence[str] = ('uniform', 'updating'),
  weights: Sequence[str] = ('uniform',),
  k: int | None = None,
  batch_size: int = 32,
  posterior: ensemble.Posterior = ensemble.Posterior(),
  router: Callable[[Sequence[Mapping[str, Any]]], np.ndarray] | None = None,
  context: int = 32,
) -> base.Table:
  """Bits per byte of the seed, every expert, ensembles and averages.

  Args:
    forest: with experts.
    sets: `{domain: batches}` with `num_bytes`; cached priors are those that
      the forest has of these domains.
    ensembles: modes, see `mixed`.
    weights: kinds of averages of weights, see `averages.weights`.
    k: for 'topk' of either.
    batch_size: see `mixed`.
    posterior: likewise.
    router: weights `[sequences, K]` of the rows of some batches, by their first
      tokens; see `route.Router`.
    context: how many tokens these are.

  Returns:
    Rows `seed`, `expert NAME`, `ensemble MODE`, `ensemble routed`,
    `average KIND`.

  Raises:
    ConfigError: an unknown mode or kind, or a domain without the prior that one
      needs; before anything is scored.
  """
  known = {domain: forest.prior(domain) for domain in sets}
  for domain, prior in known.items():
    for mode in ensembles:
      check_mode(mode, prior, domain, k)
  shares = {
    (kind, domain): averages.weights(
      forest, kind, prior=prior, k=k if kind == 'topk' else None
    )
    for kind in weights
    for domain, prior in known.items()
  }
  scorer = expert_table.Scorer(forest.module)
  lps = likelihoods(forest, sets, scorer)
  rows = {'seed': scorer.scores(forest.params('seed'), sets)}
  for i, name in enumerate(forest.experts):
    rows[f'expert {name}'] = {
      domain: expert_table.score(lp[i], sets[domain])
      for domain, lp in lps.items()
    }
  for mode in ensembles:
    rows[f'ensemble {mode}'] = {
      domain: expert_table.score(
        mixed(
          lp,
          scorer.mask(sets[domain]),
          mode,
          prior=known[domain],
          k=k,
          batch_size=batch_size,
          posterior=posterior,
          domain=domain,
        ),
        sets[domain],
      )  # fmt: skip
      for domain, lp in lps.items()
    }
  if router is not None:
    rows['ensemble routed'] = {
      domain: expert_table.score(
        routed(lp, scorer.mask(sets[domain]), router(sets[domain]), context),
        sets[domain],
      )
      for domain, lp in lps.items()
    }
  for kind in weights:
    rows[f'average {kind}'] = _of_averages(
      forest, {d: shares[kind, d] for d in sets}, sets, scorer
    )
  return base.Table(rows)


def _of_averages(forest, shares, sets, scorer):
  """Scores of averages of weights; one that serves several domains is made once."""
  found: dict[str, base.Score] = {}
  for own in {tuple(one.items()): one for one in shares.values()}.values():
    params = averages.average(forest, own)
    found |= scorer.scores(
      params, {d: sets[d] for d in sets if shares[d] == own}
    )
  return {domain: found[domain] for domain in sets}
