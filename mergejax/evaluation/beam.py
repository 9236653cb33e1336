# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Beam search with the length penalty of T5X."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import positions as positions_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
  """Keeps the most likely answers begun, and the best ones ended.

  An ended answer of n tokens, its end token included, has the score

      log p(answer) / ((5 + n) / 6)^alpha

  and the search of a row is over when no answer begun can beat the worst of
  `beams` ended ones, whatever its length. An answer without its end token
  counts only in a row where none has ended; its score is its log-likelihood.

  Attributes:
    beams: answers begun, and answers given, of a row; 4 as in T5X.
    alpha: favours long answers; 0 does not. 0.6 as in T5X and in the paper.

  Raises:
    ConfigError: a number out of its range.

  Source: Wu et al., "Google's Neural Machine Translation System" (2016),
  https://arxiv.org/abs/1609.08144, section 7. T5X counts the tokens of a prompt
  as well; here the length is that of the answer.
  """

  beams: int = 4
  alpha: float = 0.6

  def __post_init__(self):
    errors.check_whole('beams', self.beams)
    errors.check_number('alpha', self.alpha, 0)

  @property
  def answers(self) -> int:
    """Answers to a row."""
    return self.beams

  draws = False
  # Answers are in T5X's order, from worst to best.
  best = -1

  def decode(
    self,
    positions: positions_lib.Positions,
    *,
    end: int,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    scored: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """The best answers that the search finds, see `Method.decode`.

    They stand from worst to best. Where fewer than `beams` have ended, the
    first ones are empty and their scores -inf.
    """
    del key, rows, scored
    count, beams = positions.start.shape[0], self.beams
    said = jnp.repeat(positions.prompt[:, None], beams, axis=1)
    none = jnp.full((count, beams), -jnp.inf, jnp.float32)
    begun = none.at[:, 0].set(0.0)
    state = _Search(
      positions.begin, said, begun, positions.cache, jnp.zeros_like(said), none,
      ~positions.real,
    )  # fmt: skip
    state = jax.lax.while_loop(
      lambda s: (s.at < positions.total) & ~jnp.all(s.done),
      lambda s: _step(positions, self, end, s),
      state,
    )
    any_ended = state.scores[:, :1] > -jnp.inf
    scores = jnp.where(any_ended, state.scores, state.log_p)
    said = jnp.where(any_ended[..., None], state.ended, state.said)
    real = positions.real[:, None]
    said = jnp.where((real & (scores > -jnp.inf))[..., None], said, 0)
    scores = jnp.where(real, scores, 0.0)
    return positions.cut(said)[:, ::-1], scores[:, ::-1]


class _Search(NamedTuple):
  """Where a search is; of each row, the most likely answer first.

  Attributes:
    at: `<int32>[]` the position to decode.
    said: `<int32>[rows, beams, total]` answers begun, after their prompts.
    log_p: `<float32>[rows, beams]` of answers begun; -inf is none.
    cache: the model's, of answers begun.
    ended: `<int32>[rows, beams, total]` answers ended.
    scores: `<float32>[rows, beams]` of answers ended; -inf is none.
    done: `<bool>[rows]` whose search is over.
  """

  at: jax.Array
  said: jax.Array
  log_p: jax.Array
  cache: typing.Tree
  ended: jax.Array
  scores: jax.Array
  done: jax.Array


def penalty(length: typing.Array, alpha: float) -> jax.Array:
  """`((5 + length) / 6)^alpha`."""
  return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def _step(positions, method, end, state):
  """One position further."""
  rows, beams = state.log_p.shape
  at, flat = state.at, lambda x: x.reshape(rows * beams, *x.shape[2:])
  logits, cache = positions.next_logits(state.cache, flat(state.said), at)
  # Twice as many as there are beams: if half of them end, the others go on.
  log_p, parents, tokens = _candidates(
    logits.reshape(rows, beams, -1), state.log_p, 2 * beams
  )
  said = _of_parents(state.said, parents).at[:, :, at].set(tokens)
  ends = (tokens == end) & (log_p > -jnp.inf)

  going_on, picks = jax.lax.top_k(jnp.where(ends, -jnp.inf, log_p), beams)
  length = at + 1 - positions.start
  worth = log_p / penalty(length, method.alpha)[:, None]
  scores = jnp.concatenate(
    [state.scores, jnp.where(ends, worth, -jnp.inf)], axis=1
  )
  scores, best = jax.lax.top_k(scores, beams)
  ended = _of_parents(jnp.concatenate([state.ended, said], axis=1), best)

  # The best that an answer begun can come to is what it is now, at full length.
  bound = going_on[:, 0] / penalty(positions.length, method.alpha)
  over = (scores[:, -1] > bound) | (length >= positions.length)
  # A row in its prompt, or whose search is over, stays as it is.
  active = (at >= positions.start) & ~state.done
  told = state.said.at[:, :, at].set(positions.prompt[:, at][:, None])
  own = jnp.broadcast_to(jnp.arange(beams), (rows, beams))
  chosen = jnp.take_along_axis(parents, picks, axis=1)
  keep = lambda new, old: jnp.where(
    active.reshape(-1, *(1,) * (new.ndim - 1)), new, old
  )
  return _Search(
    at + 1,
    keep(_of_parents(said, picks), told),
    keep(going_on, state.log_p),
    positions.reorder(cache, keep(chosen, own)),
    keep(ended, state.ended),
    keep(scores, state.scores),
    state.done | (active & over),
  )


def _candidates(logits, log_p, count):
  """The most likely continuations of a row's answers, the best first.

  Args:
    logits: `<float>[rows, beams, vocab]`.
    log_p: `<float32>[rows, beams]` of the answers so far.
    count: how many are wanted.

  Returns:
    `(log_p, which answer it continues, token)`, `[rows, count]` each; fewer
    where so many there are not.
  """
  rows, beams, vocab = logits.shape
  logits = logits.astype(jnp.float32)
  # First those of each answer: the sum over all beams need not be laid out.
  top, tokens = jax.lax.top_k(logits, min(count, vocab))
  log_p = log_p - jax.nn.logsumexp(logits, axis=-1)
  log_p, picks = jax.lax.top_k(
    (top + log_p[..., None]).reshape(rows, -1), min(count, beams * vocab)
  )
  parents = picks // top.shape[-1]
  tokens = jnp.take_along_axis(tokens.reshape(rows, -1), picks, axis=1)
  return log_p, parents, tokens


def _of_parents(said, parents):
  """`[rows, n, total], [rows, m] -> [rows, m, total]`."""
  return jnp.take_along_axis(said, parents[..., None], axis=1)
