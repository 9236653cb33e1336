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

from collections.abc import Iterable, Iterator
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing

POSTERIORS = ('full_bayes', 'one_step', 'fixed', 'simple_average')
AVERAGES = ('uniform', 'argmax', 'posterior', 'topk')
# These go by the prior of a domain.
AVERAGES_BY_PRIOR = AVERAGES[1:]


def uniform_prior(experts: int) -> np.ndarray:
  """`1/K` for each of K experts."""
  return np.full(experts, 1.0 / experts)


def check_prior(prior: typing.Array, experts: int) -> np.ndarray:
  """A prior as float64, checked.

  Args:
    prior: `[K]`, or `[K, batch]` where every row has its own.
    experts: K.

  Raises:
    UserError: not one non-negative number per expert that sum to 1.
  """
  prior = np.asarray(prior, np.float64)
  if prior.ndim not in (1, 2) or prior.shape[0] != experts:
    raise errors.ConfigError(
      f'The prior has shape {list(prior.shape)} for {experts} experts: give '
      'one probability each.'
    )
  sums = prior.sum(axis=0)
  if not (prior >= 0).all() or not (abs(sums - 1) <= 1e-4).all():
    raise errors.ConfigError(
      f'The prior {prior.tolist()} is not a distribution: its entries must '
      'be non-negative and sum to 1.'
    )
  return prior


@dataclasses.dataclass(frozen=True)
class Posterior:
  """How the weights of experts follow from what they said of a text.

  One definition for scoring (`log_posterior`, all positions at once) and for
  generation (`start`, `advance`, `log_weights`, one token after the other).

      full_bayes:     w_t,j ~ prior_j * prod_{s<t} p_j(x_s | x_<s)^tempering
      one_step:       w_t,j ~ prior_j * p_j(x_{t-1} | x_<t-1)^tempering
      fixed:          w_t,j = prior_j
      simple_average: w_t,j = 1/K

  `full_bayes` is the paper's definition. `one_step` is what the released
  evaluator computes; its position 0 is uniform even with a prior. `fixed` is
  for weights that come from elsewhere, such as a router of contexts.

  Attributes:
    kind: see above.
    tempering: exponent on the likelihood; less than 1 slows the saturation
      that long histories bring.
    floor: least weight of an expert whose prior is not 0: long histories make
      weights one-hot, and a text may turn.

  Raises:
    ConfigError: an unknown kind, or a number out of its range.

  Source: Li et al., "Branch-Train-Merge" (2022), section 3.
  """

  kind: str = 'full_bayes'
  tempering: float = 1.0
  floor: float = 0.0

  def __post_init__(self):
    if self.kind not in POSTERIORS:
      raise errors.ConfigError(
        errors.near(str(self.kind), POSTERIORS, 'domain posterior')
      )
    errors.check_number('tempering', self.tempering, 0)
    errors.check_number('floor', self.floor, 0, 1)

  def start(self, log_prior: jax.Array) -> jax.Array:
    """`<float32>[K, ...]` state before the first token, from the log prior."""
    if self.kind in ('one_step', 'simple_average'):
      return jnp.zeros_like(log_prior)
    return log_prior

  def advance(
    self,
    state: jax.Array,
    log_prior: jax.Array,
    lp: jax.Array,
    real: jax.Array,
  ) -> jax.Array:
    """The state after one more token.

    Args:
      state: `<float32>[K, batch]`.
      log_prior: `<float32>[K, batch]`.
      lp: `<float32>[K, batch]` log-likelihood of the token under each expert.
      real: `<bool>[batch]`; padding moves nothing.
    """
    if self.kind in ('fixed', 'simple_average'):
      return state
    before = state if self.kind == 'full_bayes' else log_prior
    return jnp.where(real, before + self.tempering * lp, state)

  def log_weights(self, state: jax.Array) -> jax.Array:
    """`<float32>[K, ...]` log weights of a state, normalised over K."""
    log_w = jax.nn.log_softmax(state, axis=0)
    if not self.floor:
      return log_w
    raised = jnp.maximum(log_w, float(np.log(self.floor)))
    # A prior of 0 has removed its expert, and no floor brings it back.
    raised = jnp.where(state > -jnp.inf, raised, -jnp.inf)
    return jax.nn.log_softmax(raised, axis=0)


def log_posterior(
  lp: typing.Array,
  mask: typing.Array,
  prior: typing.Array | None = None,
  *,
  kind: str = 'full_bayes',
  tempering: float = 1.0,
  floor: float = 0.0,
) -> jax.Array:
  """Log-probability of every expert before each token, and after the last.

  Args:
    lp: `<float32>[K, batch, length]` log-likelihood of each token.
    mask: `<bool>[batch, length]`, True on real tokens. The posterior does not
      move at padding, so padding changes nothing. (The released code reads its
      last column, padded or not.)
    prior: `[K]`, or `[K, batch]` for rows of their own; uniform by default. An
      entry of 0 removes the expert. Under `jit` it may be traced.
    kind: see `Posterior`.
    tempering: likewise.
    floor: likewise.

  Returns:
    `<float32>[K, batch, length + 1]`, normalised over K; column t is used to
    predict token t, the last column is the posterior of the whole text.

  Raises:
    UserError: an unknown kind or a prior that is none.

  Example:
    >>> lp = np.log([[[0.9, 0.9]], [[0.1, 0.1]]])
    >>> w = np.exp(log_posterior(lp, np.ones((1, 2), bool)))
    >>> w[0, 0].round(2).tolist()
    [0.5, 0.8999999761581421, 0.9900000095367432]
  """
  posterior = Posterior(kind, tempering, floor)
  log_prior = log_of_prior(prior, lp.shape[0])
  lp = jnp.asarray(lp, jnp.float32)
  likelihood = jnp.where(mask, lp, 0.0) * tempering
  start = posterior.start(jnp.broadcast_to(log_prior, lp.shape[:2]))[..., None]
  if kind == 'full_bayes':
    states = start + jnp.cumsum(likelihood, axis=-1)
  elif kind == 'one_step':
    # At padding the last real token goes on speaking.
    states = log_prior[..., None] + _hold_last(likelihood, mask)
  else:
    states = jnp.broadcast_to(start, lp.shape)
  return posterior.log_weights(jnp.concatenate([start, states], axis=-1))


def log_of_prior(prior: typing.Array | None, experts: int) -> jax.Array:
  """`<float32>[K, 1]` or `[K, batch]`: the logarithm of a prior, checked.

  Raises:
    ConfigError: see `check_prior`; a prior that JAX traces is not looked at.
  """
  if prior is None:
    prior = uniform_prior(experts)
  if not numerics.is_traced(prior):
    prior = check_prior(prior, experts)
    with np.errstate(divide='ignore'):
      found = jnp.asarray(np.log(prior), jnp.float32)
  else:
    found = jnp.log(prior.astype(jnp.float32))
  return found[:, None] if found.ndim == 1 else found


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
  mixed = jax.nn.logsumexp(weights + jnp.asarray(lp, jnp.float32), axis=0)
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
  priors = [prior for prior, _ in updating(batches, kind=kind)]
  if not priors:
    raise errors.DataError('A cached prior needs at least one batch.')
  prior = np.maximum(priors[-1], floor)
  return prior / prior.sum()


def updating(
  batches: Iterable[tuple[typing.Array, typing.Array]], **options
) -> Iterator[tuple[np.ndarray, jax.Array]]:
  """Scores a domain while its prior is learnt from it.

  `q_b` is the mean posterior of batch b; `prior_1 = q_1`, `prior_b = 0.7
  prior_{b-1} + 0.3 q_b`, without bias adjustment. Batch b is scored with
  `prior_{b-1}`, the first one with the uniform prior: no batch is scored with
  what it says itself.

  Args:
    batches: `(lp [K, batch, length], mask [batch, length])`.
    **options: see `log_posterior`.

  Yields:
    `(prior_b <float64>[K], <float32>[batch, length] log-likelihoods)`.
  """
  prior = None
  for lp, mask in batches:
    scored = log_likelihood(lp, mask, prior, **options)
    posterior = batch_posterior(lp, mask, prior, **options)
    prior = update_prior(prior, posterior)
    yield prior, scored


def keep_top(prior: typing.Array, k: int) -> np.ndarray:
  """Keeps the k largest entries of a prior and renormalises.

  Among equal entries the later ones stay, as in the released code; `k >= K`
  leaves the prior untouched.

  Raises:
    ConfigError: k is no whole number of 1 or more.
  """
  prior = np.asarray(prior, np.float64)
  errors.check_whole('top-k', k)
  if k >= len(prior):
    return prior
  kept = np.argsort(prior, kind='stable')[-k:]
  result = np.zeros_like(prior)
  result[kept] = prior[kept]
  return result / result.sum()


def average_weights(
  prior: typing.Array, kind: str, *, k: int | None = None
) -> np.ndarray:
  """Weights of a parameter average of K experts.

  Args:
    prior: `[K]`, from `cached_prior`.
    kind: `'uniform'`: 1/K; `'argmax'`: the most likely expert alone, as
      `keep_top` finds it; `'posterior'`: the prior itself; `'topk'`: its k
      largest entries, see `keep_top`.
    k: for `'topk'`.

  Returns:
    `<float64>[K]`, sums to 1.

  Raises:
    ConfigError: an unknown kind, a prior that is none, or a k where none is
      asked for.
  """
  if kind not in AVERAGES:
    raise errors.ConfigError(errors.near(kind, AVERAGES, 'kind of average'))
  if (k is None) == (kind == 'topk'):
    raise errors.ConfigError(
      f"k is for the average 'topk', which needs one: {kind!r} was given "
      f'{"no k" if k is None else f"k={k}"}.'
    )
  prior = check_prior(prior, len(prior))
  if kind == 'uniform':
    return uniform_prior(len(prior))
  if kind == 'argmax':
    return keep_top(prior, 1)
  return prior if k is None else keep_top(prior, k)
