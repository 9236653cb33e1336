# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding by draws: temperature, top-k, top-p; at temperature 0, greedily."""

import dataclasses

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.evaluation import positions as positions_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """Draws every token from `softmax(logits / temperature)`, cut off.

  The `top_k` most likely tokens are kept; of these, the fewest whose
  probabilities, among those kept, sum to `top_p` at least. The draw is from
  what is left.

  A draw depends on the key, the number of its row, that of the answer to the
  row and the place in the answer: on no other row, and not on how many there
  are, how long they are, or how they lie on a mesh.

  Attributes:
    temperature: 0 always takes the most likely token; 1 draws from what the
      model says.
    top_k: how many tokens are kept; 0 keeps all.
    top_p: the probability that is kept; 1 keeps all.
    samples: answers to a row.

  Raises:
    ConfigError: a number out of its range.

  Source: Holtzman et al., "The Curious Case of Neural Text Degeneration"
  (2020), https://arxiv.org/abs/1904.09751 (top-p); Fan et al., "Hierarchical
  Neural Story Generation" (2018), https://arxiv.org/abs/1805.04833 (top-k).
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  samples: int = 1

  def __post_init__(self):
    errors.check_number('temperature', self.temperature, 0)
    errors.check_whole('top_k', self.top_k, least=0)
    errors.check_number('top_p', self.top_p, 0, 1, open_below=True)
    errors.check_whole('samples', self.samples)

  @property
  def answers(self) -> int:
    """Answers to a row."""
    return self.samples

  @property
  def draws(self) -> bool:
    """Whether answers depend on a key."""
    return self.temperature > 0

  # Samples stand in the order in which they were drawn.
  best = 0

  def decode(
    self,
    positions: positions_lib.Positions,
    *,
    end: int,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    scored: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """Answers token by token, see `Method.decode`.

    The score of an answer is its log-likelihood under the model, whatever the
    temperature and what was cut off.

    Raises:
      ConfigError: draws without a key.
    """
    count = self.samples
    prompt = jnp.repeat(positions.prompt, count, axis=0)
    start = jnp.repeat(positions.start, count)
    finished = jnp.repeat(~positions.real, count)
    keys = (
      _keys(key, rows, positions.start.shape[0], count) if self.draws else None
    )

    def go_on(state):
      at, _, _, done, _ = state
      return (at < positions.total) & ~jnp.all(done)

    def step(state):
      at, said, cache, done, score = state
      logits, cache = positions.next_logits(cache, said, at)
      now = None if keys is None else jax.vmap(jax.random.fold_in)(
        keys, jnp.maximum(at - start, 0)
      )  # fmt: skip
      chosen = choose(logits, now, self)
      answers = at >= start
      token = jnp.where(answers, chosen, prompt[:, at])
      said = said.at[:, at].set(jnp.where(done, 0, token))
      if scored:
        score += jnp.where(answers & ~done, log_likelihood(logits, chosen), 0.0)
      last = (token == end) | (at + 1 >= start + positions.length)
      return at + 1, said, cache, done | (answers & last), score

    score = jnp.zeros(finished.shape, jnp.float32)
    state = positions.begin, prompt, positions.cache, finished, score
    _, said, _, _, score = jax.lax.while_loop(go_on, step, state)
    apart = lambda x: x.reshape(-1, count, *x.shape[1:])
    return positions.cut(apart(said)), apart(score)


def kept(
  logits: jax.Array, method: Sample
) -> tuple[jax.Array, jax.Array | None]:
  """What may be drawn.

  Args:
    logits: `<float32>[..., vocab]`.
    method: with a temperature above 0.

  Returns:
    `(<float32>[..., n] logits over the temperature, -inf where cut off,
    <int32>[..., n] their tokens, the most likely first, or None: all in order)`.
  """
  scaled = logits.astype(jnp.float32) / method.temperature
  vocab = logits.shape[-1]
  count = min(method.top_k or vocab, vocab)
  if count == vocab and method.top_p >= 1:
    return scaled, None
  scaled, tokens = jax.lax.top_k(scaled, count)
  probabilities = jax.nn.softmax(scaled)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  # The most likely token is kept whatever `top_p` is: nothing is before it.
  return jnp.where(before < method.top_p, scaled, -jnp.inf), tokens


def choose(
  logits: jax.Array, keys: jax.Array | None, method: Sample
) -> jax.Array:
  """The next tokens.

  Args:
    logits: `<float32>[rows, vocab]`.
    keys: `<key>[rows]`; None at temperature 0.
    method: how to choose.

  Returns:
    `<int32>[rows]`.
  """
  if keys is None or not method.draws:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  scaled, tokens = kept(logits, method)
  drawn = jax.vmap(jax.random.categorical)(keys, scaled)
  if tokens is not None:
    drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]
  return drawn.astype(jnp.int32)


def log_likelihood(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """`<float32>[rows]`: log-probabilities of tokens."""
  logits = logits.astype(jnp.float32)
  taken = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
  return taken - jax.nn.logsumexp(logits, axis=1)


def _keys(key, rows, count, samples):
  """`<key>[rows * samples]`, one for each answer."""
  if key is None:
    raise errors.ConfigError(
      'Answers at a temperature above 0 are drawn: give a key, '
      '`key=jax.random.key(0)`, or decode at temperature 0.'
    )
  rows = jnp.arange(count) if rows is None else jnp.asarray(rows)
  of_answer = jax.vmap(jax.random.fold_in, (None, 0))
  of_rows = of_answer(key, rows)
  keys = jax.vmap(of_answer, (0, None))(of_rows, jnp.arange(samples))
  return keys.reshape(-1)
