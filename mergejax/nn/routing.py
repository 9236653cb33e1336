# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which expert sees which token: pure functions of a router's numbers.

Tokens lie in groups, `[groups, tokens]`; each group is routed by itself, and in
each every expert has room for `capacity` tokens. Everything here is float32
whatever the model computes in: in bfloat16 a router diverges.

Sources: Fedus et al., "Switch Transformers" (2021),
https://arxiv.org/abs/2101.03961; Lepikhin et al., "GShard" (2020),
https://arxiv.org/abs/2006.16668; Artetxe et al., "Efficient Large Scale
Language Modeling with Mixtures of Experts" (2021),
https://arxiv.org/abs/2112.10684; Zhou et al., "Mixture-of-Experts with Expert
Choice Routing" (2022), https://arxiv.org/abs/2202.09368.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing

# What flaxformer's two routers make of padding, and what it does by default.
ROUTED, MASK, SCATTER = 'routed', 'mask', 'scatter'
LEGACY_PADDING = (ROUTED, MASK, SCATTER)
ARGMAX, SAMPLING, RANDOM = 'argmax', 'sampling', 'random'
SECOND_EXPERT = (ARGMAX, SAMPLING, RANDOM)


class Choices(NamedTuple):
  """The experts that every token chose, its first choice first.

  Attributes:
    experts: `<int32>[groups, tokens, k]` which expert.
    positions: `<int32>[groups, tokens, k]` the place in that expert's queue;
      at or beyond the capacity it is dropped.
    weights: `<float32>[groups, tokens, k]` what the expert's output is
      multiplied by; 0 where dropped.
    kept: `<bool>[groups, tokens, k]`: not dropped, and no padding but what the
      `legacy_padding` 'scatter' lets queue.
    chosen: `<float32>[groups, tokens, experts]` 1 for the chosen experts, before
      anything is dropped: what the balance loss looks at.
  """

  experts: jax.Array
  positions: jax.Array
  weights: jax.Array
  kept: jax.Array
  chosen: jax.Array


class Slots(NamedTuple):
  """The tokens that every expert chose.

  Attributes:
    tokens: `<int32>[groups, experts, capacity]` a place in the group, best
      first; the number of tokens where a slot is empty.
    weights: `<float32>[groups, experts, capacity]`; 0 where it is empty.
  """

  tokens: jax.Array
  weights: jax.Array


def tokens_choose(
  probabilities: typing.Array,
  k: int,
  capacity: int | None,
  *,
  real: typing.Array | None = None,
  prioritise: bool = False,
  normalize: bool = False,
  legacy_padding: str | None = None,
) -> Choices:
  """Every token goes to its k most probable experts, as far as there is room.

  All first choices queue before all second ones; inside one choice tokens queue
  as they stand. A choice that finds no room still counts for those behind it.

  Args:
    probabilities: `<float32>[groups, tokens, experts]`; of equal ones the first
      expert is taken.
    k: experts a token; 1 in Switch.
    capacity: room of an expert; None drops nothing.
    real: `<bool>[groups, tokens]` False for padding, which takes no room; None
      where there is none.
    prioritise: tokens queue by the probability of their first choice, largest
      first. It looks at the whole group, later tokens too: not for decoders.
    normalize: the weights of a token's choices sum to 1 before anything is
      dropped; by default they are the raw probabilities, as in flaxformer.
    legacy_padding: 'scatter' lets padding queue in front of experts 0, 1, ...,
      with weight 0, as flaxformer's scatter router does; 'routed' takes it for
      tokens like others; 'mask' is as by default here.

  Returns:
    See `Choices`.

  Raises:
    ConfigError: more choices than experts, or an unknown `legacy_padding`.

  Source: Fedus et al. (2021), section 2.2; prioritised: Riquelme et al. (2021),
  https://arxiv.org/abs/2106.05974, section 3.3.
  """
  experts = probabilities.shape[-1]
  check_choices(k, experts)
  real = _queueing(real, legacy_padding)
  if legacy_padding == SCATTER and real is not None:
    probabilities = jnp.where(real[..., None], probabilities, 0.0)
    real = None
  gates, hot = _best(probabilities, k)
  if real is not None:
    hot = hot * real[..., None, None].astype(hot.dtype)
    gates = jnp.where(real[..., None], gates, 0.0)
  positions = _positions(hot, gates[..., 0] if prioritise else None)
  if normalize:
    gates = gates / jnp.maximum(jnp.sum(gates, -1, keepdims=True), 1e-9)
  return _choices(hot, positions, gates, capacity)


def check_choices(k: int, experts: int) -> None:
  """Raises if a token cannot choose so many experts."""
  errors.check_whole('The number of experts that a token chooses', k)
  if k > experts:
    raise errors.ConfigError(
      f'A token cannot choose {k} experts: there are {experts}.'
    )


def _queueing(real, legacy_padding):
  """Which tokens queue, None for all."""
  if legacy_padding not in (None, *LEGACY_PADDING):
    raise errors.ConfigError(
      errors.near(str(legacy_padding), LEGACY_PADDING, 'legacy_padding')
    )
  return None if legacy_padding == ROUTED else real


def _best(scores, k):
  """`(<float32>[g, t, k], <float32>[g, t, k, experts])`: scores, one-hot.

  Several argmaxes rather than a sort: k is 1 or 2. Sums over the one-hot rather
  than gathers, whose gradients would be scatters.
  """
  gates, hot, left = [], [], scores
  for _ in range(k):
    each = jax.nn.one_hot(
      jnp.argmax(left, -1), scores.shape[-1], dtype=jnp.float32
    )
    gates.append(jnp.sum(scores * each, -1))
    hot.append(each)
    left = jnp.where(each > 0, -jnp.inf, left)
  return jnp.stack(gates, -1), jnp.stack(hot, -2)


def _positions(hot, priority=None):
  """`<int32>[groups, tokens, k]` places in the queues of the chosen experts."""
  groups, tokens, k, experts = hot.shape
  counted = jax.lax.stop_gradient(hot).astype(jnp.int32)
  if priority is not None:
    order = jnp.argsort(-jax.lax.stop_gradient(priority), axis=-1)
    places = jnp.argsort(order, axis=-1)
    counted = jnp.take_along_axis(counted, order[..., None, None], 1)
  # [groups, tokens, k, experts] -> all first choices, then all second ones
  queue = jnp.swapaxes(counted, 1, 2).reshape(groups, k * tokens, experts)
  before = jnp.sum((jnp.cumsum(queue, 1) - queue) * queue, -1)
  positions = jnp.swapaxes(before.reshape(groups, k, tokens), 1, 2)
  if priority is not None:
    positions = jnp.take_along_axis(positions, places[..., None], 1)
  return positions


def _choices(hot, positions, gates, capacity):
  """`Choices` of one-hot choices (all 0 for padding) with places in queues."""
  kept = jnp.any(hot > 0, -1)
  if capacity is not None:
    kept &= positions < capacity
  return Choices(
    jnp.argmax(hot, -1).astype(jnp.int32),
    positions,
    jnp.where(kept, gates, 0.0),
    kept,
    jnp.sum(hot, -2),
  )


def gshard_top2(
  logits: typing.Array,
  capacity: int | None,
  *,
  real: typing.Array | None = None,
  second_expert: str = SAMPLING,
  normalize_before_dropping: bool = False,
  key: jax.Array | None = None,
) -> Choices:
  """GShard's top-2 as fairseq has it: weights that sum to 1.

  Second choices queue behind all first choices of their expert, those without
  room among them.

  Args:
    logits: `<float32>[groups, tokens, experts]`.
    capacity: room of an expert, see `token_groups.gshard_capacity`; None drops
      nothing.
    real: see `tokens_choose`.
    second_expert: 'argmax' is the second most probable; 'sampling' draws it in
      proportion to the probabilities of the others (Gumbel noise on the
      logits); 'random' keeps the second most probable with probability `min(1,
      2 g2)`, g2 its weight.
    normalize_before_dropping: a weight stays as it was when the other choice
      found no room. By default weights sum to 1 afterwards: a token whose first
      choice found no room gives its second the weight 1.
    key: for 'sampling' and 'random'; without one (in evaluation) the second is
      the second most probable.

  Returns:
    See `Choices`; `chosen` has first choices only, as its balance loss.

  Raises:
    ConfigError: a single expert, or an unknown `second_expert`.

  Source: Lepikhin et al. (2020), algorithm 1; Artetxe et al. (2021), whose code
  normalises after dropping.
  """
  if second_expert not in SECOND_EXPERT:
    raise errors.ConfigError(
      errors.near(second_expert, SECOND_EXPERT, 'second_expert')
    )
  check_choices(2, logits.shape[-1])
  gates = jax.nn.softmax(logits)
  _, first = _best(gates, 1)
  first = first[..., 0, :]
  others = logits
  if second_expert == SAMPLING and key is not None:
    others = others + jax.random.gumbel(key, logits.shape, jnp.float32)
  _, second = _best(jnp.where(first > 0, -jnp.inf, others), 1)
  hot = jnp.stack([first, second[..., 0, :]], -2)
  if real is not None:
    hot = hot * real[..., None, None].astype(hot.dtype)
  weights = jnp.sum(gates[..., None, :] * hot, -1)
  if normalize_before_dropping:
    weights = _normalized(weights)
  if second_expert == RANDOM and key is not None:
    drawn = jax.random.uniform(key, weights.shape[:-1], jnp.float32)
    keep = jnp.stack(
      [jnp.ones_like(drawn), (2 * weights[..., 1] > drawn).astype(drawn.dtype)],
      -1,
    )
    hot, weights = hot * keep[..., None], weights * keep
  found = _choices(hot, _positions(hot), weights, capacity)
  if not normalize_before_dropping:
    found = found._replace(weights=_normalized(found.weights))
  return found._replace(chosen=hot[..., 0, :])


def _normalized(weights):
  total = jnp.sum(weights, -1, keepdims=True)
  return weights / jnp.maximum(total, jnp.finfo(jnp.float32).eps)


def experts_choose(
  probabilities: typing.Array,
  capacity: int,
  *,
  real: typing.Array | None = None,
  legacy_padding: str | None = None,
) -> Slots:
  """Every expert takes the tokens that it is most probable for.

  All experts are full, so no balance loss is needed; a token may find none, or
  several. It looks at all tokens of a group, later ones too: not for decoders.

  Args:
    probabilities: `<float32>[groups, tokens, experts]`.
    capacity: tokens that an expert takes of a group.
    real: `<bool>[groups, tokens]` False for padding, which no expert takes;
      None where there is none.
    legacy_padding: 'mask' takes padding, with the weight 0, where an expert
      has room left, as flaxformer; 'routed' takes it for tokens like others.

  Raises:
    ConfigError: an expert would have to take more tokens than there are.

  Source: Zhou et al. (2022), section 3.
  """
  tokens = probabilities.shape[1]
  if capacity > tokens:
    raise errors.ConfigError(
      f'An expert cannot take {capacity} tokens of a group of {tokens}: choose '
      'a smaller capacity factor or minimum capacity, or larger groups.'
    )
  real = _queueing(real, legacy_padding)
  if real is not None:
    probabilities = jnp.where(real[..., None], probabilities, 0.0)
  weights, found = jax.lax.top_k(jnp.swapaxes(probabilities, 1, 2), capacity)
  if real is not None and legacy_padding is None:
    taken = jax.vmap(lambda own, at: own[at])(real, found)
    found = jnp.where(taken, found, tokens)
  return Slots(found.astype(jnp.int32), weights)
