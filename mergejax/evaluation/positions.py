# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How the logits of one position after another come about.

What all ways to decode share: where the prompt of a row ends and its answer
begins, and a model's cache, which serves several answers to every row.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

_PLAIN = {'decoder_input_tokens', 'decoder_target_tokens'}


def is_decoder_only(family: models.ModelFamily) -> bool:
  """Whether a model reads nothing but the tokens it continues."""
  return set(family.example_batch()) <= _PLAIN


class Positions(NamedTuple):
  """A batch, ready to be answered.

  Attributes:
    prompt: `<int32>[rows, total]` what is given of every row, then 0.
    start: `<int32>[rows]` where its answer begins.
    real: `<bool>[rows]`, False where a row only fills the batch.
    begin: `<int32>[]` the first position to decode.
    length: most tokens of an answer.
    cache: what the model keeps, of `answers` answers to every row.
    next_logits: `(cache, <int32>[rows * answers, total] tokens so far,
      position) -> (<float32>[rows * answers, vocab], cache)`.
    reorder: `(cache, <int32>[rows, answers]) -> cache` in which an answer goes
      on from the one of that number.
  """

  prompt: jax.Array
  start: jax.Array
  real: jax.Array
  begin: jax.Array
  length: int
  cache: typing.Tree
  next_logits: Callable[..., tuple[jax.Array, typing.Tree]]
  reorder: Callable[[typing.Tree, jax.Array], typing.Tree]

  @property
  def total(self) -> int:
    """Positions of a prompt and an answer."""
    return self.prompt.shape[1]

  def cut(self, said: jax.Array) -> jax.Array:
    """`<int32>[rows, answers, total] -> [rows, answers, length]`: answers."""
    places = self.start[:, None, None] + jnp.arange(self.length)[None, None]
    return jnp.take_along_axis(said, places, axis=2)


class Method(Protocol):
  """A way to answer: a value that can be hashed, for it is compiled with.

  Attributes:
    answers: how many it gives to a row.
    best: which of them stands for the row.
    draws: whether they depend on a key.
  """

  @property
  def answers(self) -> int: ...

  @property
  def best(self) -> int: ...

  @property
  def draws(self) -> bool: ...

  def decode(
    self,
    positions: Positions,
    *,
    end: int,
    key: jax.Array | None = None,
    rows: jax.Array | None = None,
    scored: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """Answers to a batch; traceable.

    Args:
      positions: the batch, of `answers` answers to a row.
      end: the token after which an answer stops.
      key: what draws come from.
      rows: `<int32>[rows]` numbers of the rows, which go into their draws; 0,
        1, ... by default.
      scored: False where scores are not wanted, which may be less work.

    Returns:
      `(<int32>[rows, answers, length] answers with their end token, 0 after it,
      <float32>[rows, answers] scores)`.
    """
    ...


def check_decodes(family: models.ModelFamily, name: object = None) -> None:
  """Raises a `ConfigError` for a model that says nothing.

  Args:
    family: of the model.
    name: what the user calls it.
  """
  if not family.decodes:
    told = f'{family.model_type or type(family).__name__} models do not decode'
    if name is not None:
      told = f'{name}: {told}'
    raise errors.ConfigError(f"{told}: score them by 'accuracy' or 'loss'.")


def prepare(
  family: models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  *,
  length: int,
  answers: int = 1,
) -> Positions:
  """Reads the inputs of a batch, once for all answers to them.

  Args:
    family: of the model.
    params: of the model.
    batch: see `decode.Decoder`.
    length: most tokens of an answer.
    answers: to every row, side by side.

  Raises:
    ConfigError: a model that does not decode.
    DataError: rows that hold several examples.
  """
  check_decodes(family)
  if family.segments(batch) is not None:
    raise errors.DataError(
      'These rows hold several examples (`decoder_segment_ids`), and a row has '
      'one answer: give batches that are not packed.'
    )
  prompt = _prompt(family, batch)
  start = jnp.sum(prompt > 0, axis=1)
  total = prompt.shape[1] + length
  prefix = batch.get('decoder_causal_attention')
  if prefix is not None and is_decoder_only(family):
    begin, cache = jnp.min(start), ()
    next_logits = _whole_rows(family, params, prefix, total, answers)
  else:
    begin = jnp.zeros((), start.dtype)
    cache = _repeated(family, family.init_cache(params, batch, total), answers)
    next_logits = _with_cache(family, params)
  return Positions(
    jnp.pad(prompt, ((0, 0), (0, length))),
    start,
    _real(family, batch),
    begin,
    length,
    cache,
    next_logits,
    functools.partial(_reordered, family),
  )


def _prompt(family, batch):
  """`<int32>[rows, width]`, 0 after a row's end; no column if there is none."""
  weights = batch.get('decoder_loss_weights', batch.get('weights'))
  rows = next(iter(batch.values())).shape[0]
  if not is_decoder_only(family) or weights is None:
    return jnp.zeros((rows, 0), jnp.int32)
  tokens = jnp.asarray(batch['decoder_target_tokens'], jnp.int32)
  return jnp.where(jnp.asarray(weights) > 0, 0, tokens)


def _real(family, batch):
  """`<bool>[rows]`, False where a row only fills the batch."""
  if 'decoder_target_tokens' not in batch:
    return jnp.ones(next(iter(batch.values())).shape[0], jnp.bool_)
  return jnp.any(family.target_weights(batch) > 0, axis=1)


def _with_cache(family, params):
  """One position a call; those before it are in the cache."""

  def next_logits(cache, said, at):
    before = jnp.where(at > 0, said[:, at - 1], 0)
    return family.decode_step(params, cache, before)

  return next_logits


def _whole_rows(family, params, prefix, total, answers):
  """A forward pass a call: a prefix that sees itself has no cache."""
  prefix = jnp.repeat(jnp.asarray(prefix), answers, axis=0)
  prefix = jnp.pad(prefix, ((0, 0), (0, total - prefix.shape[1])))
  # The mark reaches one position further than the prompt: it is the last one
  # of the prompt, which the shift by one has put there.
  ahead = jnp.sum(prefix > 0, axis=1)

  def next_logits(cache, said, at):
    seen = jnp.maximum(at + 1, ahead)[:, None]
    known = jnp.arange(total, dtype=seen.dtype)[None] < seen
    row = {
      'decoder_input_tokens': jnp.pad(said, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': known.astype(jnp.int32),
      'decoder_causal_attention': prefix,
    }
    return family.logits(params, row)[:, at], cache

  return next_logits


def _map_rows(family, cache, function):
  """`function(leaf, axis of its rows)` of the leaves that have rows."""

  def of_leaf(path, leaf):
    axis = family.cache_rows(path, leaf)
    return leaf if axis is None else function(leaf, axis)

  return tree.map_paths(of_leaf, cache)


def _repeated(family, cache, answers):
  """The cache of several answers to each row, side by side."""
  if answers == 1:
    return cache
  return _map_rows(family, cache, lambda leaf, i: jnp.repeat(leaf, answers, i))


def _reordered(family, cache, parents):
  """The cache in which an answer goes on from another one to the same row."""
  rows, answers = parents.shape

  def of_leaf(leaf, axis):
    shape = leaf.shape
    apart = leaf.reshape(*shape[:axis], rows, answers, *shape[axis + 1 :])
    # Row by row: where rows are spread over a mesh, none leaves its device.
    take = lambda row, picks: jnp.take(row, picks, axis=axis)
    taken = jax.vmap(take, (axis, 0), axis)(apart, parents)
    return taken.reshape(shape)

  return _map_rows(family, cache, of_leaf)
