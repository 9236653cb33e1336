# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What keeps a router balanced, and the numbers by which people watch it."""

import jax
import jax.numpy as jnp

from mergejax.core import typing
from mergejax.nn import routing


def load_balance(
  probabilities: typing.Array,
  chosen: typing.Array,
  *,
  real: typing.Array | None = None,
  legacy_padding: str | None = None,
) -> jax.Array:
  """`E^2 mean_{g,e}(f P)`: small where tokens spread evenly over experts.

  `f` is the share of a group's tokens that chose an expert, before anything is
  dropped, `P` the expert's mean probability. Perfect balance gives the number
  of experts that a token chooses. The gradient goes through `P` alone.

  Args:
    probabilities: `<float32>[groups, tokens, experts]`.
    chosen: `<float32>[groups, tokens, experts]` 1 for chosen experts.
    real: `<bool>[groups, tokens]` False for padding, which counts in neither
      mean; None where there is none.
    legacy_padding: 'mask' and 'scatter' give padding the probability 0 but
      divide by all tokens, as flaxformer, whose scatter router also lets it
      choose (`chosen`); 'routed' takes it for tokens like others, as fairseq,
      where it chooses none.

  Returns:
    `<float32>[]`. A group of padding alone counts for 0.

  Example:
    >>> even = jnp.full((1, 4, 2), 0.5)
    >>> float(load_balance(even, jnp.tile(jnp.eye(2), (2, 1))[None]))
    1.0

  Source: Fedus et al. (2021), https://arxiv.org/abs/2101.03961, equation 4
  without its factor (`MoeConfig.balance_loss`), the mean over groups.
  """
  experts = probabilities.shape[-1]
  chosen = jax.lax.stop_gradient(chosen)
  if real is None or legacy_padding == routing.ROUTED:
    share, mean = jnp.mean(chosen, 1), jnp.mean(probabilities, 1)
  elif legacy_padding is not None:
    share = jnp.mean(chosen, 1)
    mean = jnp.mean(jnp.where(real[..., None], probabilities, 0.0), 1)
  else:
    counted = real.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(counted, 1), 1.0)[:, None]
    share = jnp.sum(chosen * counted[..., None], 1) / count
    mean = jnp.sum(probabilities * counted[..., None], 1) / count
  # Groups of padding alone are no balanced ones.
  product = jnp.sum(share * mean, -1)
  if real is None or legacy_padding is not None:
    return experts * jnp.mean(product)
  groups = jnp.any(real, 1).astype(jnp.float32)
  return experts * jnp.sum(product * groups) / jnp.maximum(jnp.sum(groups), 1.0)


def router_z(
  logits: typing.Array,
  *,
  real: typing.Array | None = None,
  legacy_padding: str | None = None,
) -> jax.Array:
  """`mean (logsumexp_e logits)^2`: keeps a router's logits small.

  Args:
    logits: `<float32>[groups, tokens, experts]`.
    real: `<bool>[groups, tokens]` False for padding, which does not count.
    legacy_padding: 'mask' and 'scatter' count padding as a token with logits 0,
      `(ln E)^2`, as flaxformer; 'routed' takes it for tokens like others.

  Returns:
    `<float32>[]`.

  Source: Zoph et al., "ST-MoE" (2022), https://arxiv.org/abs/2202.08906,
  equation 5.
  """
  if real is not None and legacy_padding in (routing.MASK, routing.SCATTER):
    logits = jnp.where(real[..., None], logits, 0.0)
  squares = jnp.square(jax.nn.logsumexp(logits, -1))
  if real is None or legacy_padding is not None:
    return jnp.mean(squares)
  counted = real.astype(jnp.float32)
  return jnp.sum(squares * counted) / jnp.maximum(jnp.sum(counted), 1.0)


def entropy(
  probabilities: typing.Array, real: typing.Array | None = None
) -> jax.Array:
  """`mean -sum_e p ln p` over tokens that are real, in nats, `<float32>[]`."""
  of_token = jnp.sum(jax.scipy.special.entr(probabilities), -1)
  if real is None:
    return jnp.mean(of_token)
  counted = real.astype(jnp.float32)
  return jnp.sum(of_token * counted) / jnp.maximum(jnp.sum(counted), 1.0)


def metrics(
  load: typing.Array,
  reached: typing.Array,
  weights: typing.Array,
  *,
  tokens: typing.Array | float,
  pairs: typing.Array | float,
  slots: typing.Array | float,
) -> dict[str, jax.Array]:
  """How a layer's experts are used.

  Args:
    load: `<float32>[experts]` pairs of token and expert that were kept.
    reached: `<float32>[]` tokens that some expert sees.
    weights: `<float32>[]` sum of the weights of kept pairs.
    tokens: how many tokens there are, without padding.
    pairs: how many pairs were asked for.
    slots: how many all experts have room for.

  Returns:
    `<float32>[]` each, and `expert_load <float32>[experts]`:
    `fraction_tokens_left_behind` (seen by no expert), `expert_usage` (full
    slots), `experts_per_token` (kept pairs over tokens), `router_confidence`
    (mean weight of a kept pair), `dropped_pairs` (the share that found no
    room), `expert_load` (each expert's share of kept pairs), `load_cv` (its
    standard deviation over its mean), `max_load` (its largest, 1 / experts if
    balanced) and `dead_experts` (how many have none). Of no tokens they are 0,
    and all experts dead.
  """
  kept = jnp.sum(load)
  wide = lambda count: jnp.asarray(count, jnp.float32)
  over = lambda value, total: value / jnp.maximum(wide(total), 1.0)
  missing = lambda found, total: over(wide(total) - found, total)
  share = over(load, kept)
  even = 1.0 / load.shape[0]
  return {
    'fraction_tokens_left_behind': missing(reached, tokens),
    'expert_usage': over(kept, slots),
    'experts_per_token': over(kept, tokens),
    'router_confidence': over(weights, kept),
    'dropped_pairs': missing(kept, pairs),
    'expert_load': share,
    'load_cv': jnp.std(share) / even,
    'max_load': jnp.max(share),
    'dead_experts': jnp.sum((load == 0).astype(jnp.float32)),
  }
