# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixing outputs of experts: which one explains a text, and their ensemble.

Inputs are only `lp[K, batch, length]`, each expert's log-likelihood of the
tokens that came; the full distributions are never gathered.

Branch-Train-Merge takes a cached prior of each domain and mixes by it. From
Python, the prior can be cut to the experts that fit into memory (`keep_top`),
or average parameters instead of outputs (`average_weights`):

    prior = ensemble.keep_top(ensemble.cached_prior(batches), 2)
    weights = ensemble.average_weights(prior, 'posterior')
    merged = mj.merge(experts, 'linear', weights=weights)

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306, section 3; Gururangan et al., "DEMix Layers"
(2021), https://arxiv.org/abs/2108.05036, for the domain posterior.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import typing

POSTERIORS = ('full_bayes', 'one_step', 'simple_average')
AVERAGES = ('uniform', 'argmax', 'posterior')


def uniform_prior(experts: int) -> np.ndarray:
  """`1/K` for each of K experts."""
  return np.full(experts, 1.0 / experts)


def check_prior(prior: typing.Array, experts: int) -> np.ndarray:
  """A prior as float64, checked.

  Raises:
    UserError: not one non-negative number per expert that sum to 1.
  """
  prior = np.asarray(prior, np.float64)
  if prior.shape != (experts,):
    raise errors.ConfigError(
      f'The prior has shape {list(prior.shape)} for {experts} experts: give '
      'one probability each.'
    )
  if (prior < 0).any() or abs(prior.sum() - 1) > 1e-4:
    raise errors.ConfigError(
      f'The prior {prior.tolist()} is not a distribution: its entries must '
      'be non-negative and sum to 1.'
    )
  return prior


def log_posterior(
  lp: typing.Array,
  mask: typing.Array,
  prior: typing.Array | None = None,
  *,
  kind: str = 'full_bayes',
  tempering: float = 1.0,
) -> jax.Array:
  """Log-probability of every expert before each token, and after the last.

  `full_bayes`: `w_t,j ~ prior_j * prod_{s<t} p_j(x_s | x_<s)`, the paper's
  definition. `one_step`: only the previous token counts, and position 0 is
  uniform even with a prior; what the released evaluator computes.
  `simple_average`: 1/K always.

  Args:
    lp: `<float32>[K, batch, length]` log-likelihood of each token.
    mask: `<bool>[batch, length]`, True on real tokens. The posterior does not
      move at padding, so padding changes nothing. (The released code reads its
      last column, padded or not.)
    prior: `[K]`, uniform by default. An entry of 0 removes the expert.
    kind: see above.
    tempering: exponent on the likelihood; less than 1 slows the saturation
      that long histories bring.

  Returns:
    `<float32>[K, batch, length + 1]`, normalised over K; column t is used to
    predict token t, the last column is the posterior of the whole text.

  Raises:
    UserError: an unknown kind or a prior that is none.
  """
  experts = lp.shape[0]
  prior = check_prior(
    uniform_prior(experts) if prior is None else prior, experts
  )
  with np.errstate(divide='ignore'):
    log_prior = jnp.asarray(np.log(prior), jnp.float32)[:, None]
  likelihood = jnp.where(mask, lp, 0.0) * tempering
  start = jnp.zeros_like(likelihood[:, :, :1])
  if kind == 'full_bayes':
    history = jnp.cumsum(jnp.concatenate([start, likelihood], axis=-1), axis=-1)
    return jax.nn.log_softmax(log_prior[..., None] + history, axis=0)
  if kind == 'one_step':
    uniform = jnp.full_like(start, -np.log(experts))
    # At padding the last real token goes on speaking.
    last = _hold_last(likelihood, mask)
    moved = jax.nn.log_softmax(log_prior[..., None] + last, axis=0)
    return jnp.concatenate([uniform, moved], axis=-1)
  if kind == 'simple_average':
    shape = (*likelihood.shape[:-1], likelihood.shape[-1] + 1)
    return jnp.full(shape, -np.log(experts), jnp.float32)
  raise errors.ConfigError(errors.near(kind, POSTERIORS, 'domain posterior'))


def _hold_last(values, mask):
  index = jnp.where(mask, jnp.arange(mask.shape[-1]), 0)
  index = jax.lax.cummax(index, axis=index.ndim - 1)
  return jnp.take_along_axis(values, index[None], axis=-1)


def log_likelihood(
  lp: typing.Array, mask: typing.Array, prior=None, **options
) -> jax.Array:
  """Log-likelihood of each token under the mixture of the experts.

  `log sum_j w_t,j p_j(x_t | x_<t)`: probabilities are mixed, then the log is
  taken.

  Args:
    lp: `<float32>[K, batch, length]`.
    mask: `<bool>[batch, length]`.
    prior: see `log_posterior`.
    **options: see `log_posterior`.

  Returns:
    `<float32>[batch, length]`; 0 at padding.
  """
  weights = log_posterior(lp, mask, prior, **options)[..., :-1]
  mixed = jax.nn.logsumexp(weights + lp, axis=0)
  return jnp.where(mask, mixed, 0.0)


def batch_posterior(
  lp: typing.Array, mask: typing.Array, prior=None, **options
) -> np.ndarray:
  """Mean over the rows of a batch of the posterior of the whole text: `[K]`.

  Rows without a real token (they only fill a batch) do not count.

  Raises:
    DataError: no row has one.
  """
  if not np.any(mask):
    raise errors.DataError(
      'A batch without a real token says nothing of which expert it needs: its '
      'mask is 0 everywhere.'
    )
  final = np.exp(np.asarray(log_posterior(lp, mask, prior, **options)))[..., -1]
  real = np.asarray(mask).any(axis=-1)
  return final[:, real].mean(axis=1, dtype=np.float64)


def update_prior(
  prior: np.ndarray | None, posterior: np.ndarray, *, decay: float = 0.3
) -> np.ndarray:
  """Moves a prior towards a batch's posterior: `0.7 prior + 0.3 posterior`.

  Args:
    prior: `[K]`, None before the first batch, whose posterior is then taken.
    posterior: `[K]` of this batch.
    decay: share of the new posterior, 0.3 in the paper.
  """
  if prior is None:
    return np.asarray(posterior, np.float64)
  return (1 - decay) * prior + decay * posterior


def cached_prior(
  batches: Iterable[tuple[typing.Array, typing.Array]],
  *,
  kind: str = 'full_bayes',
  floor: float = 1e-6,
) -> np.ndarray:
  """Estimates which experts a domain needs from its development data.

  The updating prior, run over all batches; its last value is then held fixed
  on test data. About 100 sequences are enough.

  Args:
    batches: `(lp [K, batch, length], mask [batch, length])`.
    kind: see `log_posterior`.
    floor: least probability of an expert: one that never helped on
      development data may still be right for a test text.

  Returns:
    `<float64>[K]`, sums to 1.
  """
  prior = None
  for lp, mask in batches:
    prior = update_prior(prior, batch_posterior(lp, mask, prior, kind=kind))
  if prior is None:
    raise errors.DataError('A cached prior needs at least one batch.')
  prior = np.maximum(prior, floor)
  return prior / prior.sum()


def keep_top(prior: typing.Array, k: int) -> np.ndarray:
  """Keeps the k largest entries of a prior and renormalises.

  Among equal entries the later ones stay, as in the released code; `k >= K`
  leaves the prior untouched.

  Raises:
    UserError: k is less than 1.
  """
  prior = np.asarray(prior, np.float64)
  if k < 1:
    raise errors.ConfigError(f'top-k must keep at least 1 expert, not {k}.')
  if k >= len(prior):
    return prior
  kept = np.argsort(prior, kind='stable')[-k:]
  result = np.zeros_like(prior)
  result[kept] = prior[kept]
  return result / result.sum()


def average_weights(prior: typing.Array, kind: str) -> np.ndarray:
  """Weights of a parameter average: `uniform`, `argmax` or `posterior`."""
  prior = check_prior(prior, len(prior))
  if kind == 'uniform':
    return uniform_prior(len(prior))
  if kind == 'argmax':
    return np.eye(len(prior))[int(np.argmax(prior))]
  if kind == 'posterior':
    return prior
  raise errors.ConfigError(errors.near(kind, AVERAGES, 'kind of average'))
