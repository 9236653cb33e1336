# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model says: greedy decoding through its family, compiled.

decode = decode_lib.make_decoder(module, length=32)
tokens = decode(params, batch)  # <int32>[batch, 32], 0 after the end token
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing

# The end token of seqio's vocabularies.
END = 1
_PLAIN = {'decoder_input_tokens', 'decoder_target_tokens'}


def is_decoder_only(family: models.ModelFamily) -> bool:
  """Whether a model reads nothing but the tokens it continues."""
  return set(family.example_batch()) <= _PLAIN


def make_decoder(
  model: nn.Module | models.ModelFamily, *, length: int, end: int = END
) -> Callable[[typing.Tree, Mapping[str, Any]], np.ndarray]:
  """`(params, batch) -> tokens`: `greedy`, compiled once for every shape."""
  family = models.family_of(model)
  compiled = jax.jit(lambda p, b: greedy(family, p, b, length=length, end=end))
  return lambda params, batch: np.asarray(compiled(params, dict(batch)))


def greedy(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  *,
  length: int,
  end: int = END,
) -> jax.Array:
  """The most likely token, again and again; traceable.

  An encoder-decoder answers its `encoder_input_tokens`. A decoder-only model
  goes on after its prompt: the tokens of `decoder_target_tokens` with a weight
  of 0, as seqio's prefix features mark the inputs. A prompt that is seen in
  both directions (`decoder_causal_attention`) has no cache: it costs a forward
  pass of the whole row for every token.

  Args:
    model: a module whose family decodes, or the family.
    params: of the model.
    batch: what the family takes; targets may be missing. Rows without a target
      that counts only fill a batch and stay empty.
    length: most tokens of an answer, the end token included.
    end: the token after which a row stops.

  Returns:
    `<int32>[batch, length]`: answers with their end token, 0 after it. No row
    depends on another.

  Raises:
    ConfigError: a model that does not decode.
  """
  family = models.family_of(model)
  if not family.decodes:
    raise errors.ConfigError(
      f'{family.model_type or type(family).__name__} models do not decode: '
      "score them by 'accuracy' or 'loss'."
    )
  prompt, real = _prompt(family, batch), _real(family, batch)
  total = prompt.shape[1] + length
  start = jnp.sum(prompt > 0, axis=1)
  prompt = jnp.pad(prompt, ((0, 0), (0, length)))
  begin, cache, next_logits = _stepper(family, params, batch, total)

  def go_on(state):
    at, _, _, done = state
    return (at < total) & ~jnp.all(done)

  def step(state):
    at, said, cache, done = state
    logits, cache = next_logits(cache, said, at)
    chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    answers = at >= start
    token = jnp.where(answers, chosen, prompt[:, at])
    said = said.at[:, at].set(jnp.where(done, 0, token))
    last = (token == end) | (at + 1 >= start + length)
    return at + 1, said, cache, done | (answers & last)

  begin = jnp.min(start) if begin else jnp.zeros((), jnp.int32)
  state = begin, prompt, cache, ~real
  _, said, _, _ = jax.lax.while_loop(go_on, step, state)
  places = start[:, None] + jnp.arange(length, dtype=start.dtype)[None]
  return jnp.take_along_axis(said, places, axis=1)


def _prompt(family, batch):
  """`<int32>[rows, width]`, 0 after a row's end; no column if there is none."""
  weights = batch.get('decoder_loss_weights', batch.get('weights'))
  rows = len(next(iter(batch.values())))
  if not is_decoder_only(family) or weights is None:
    return jnp.zeros((rows, 0), jnp.int32)
  tokens = jnp.asarray(batch['decoder_target_tokens'], jnp.int32)
  return jnp.where(jnp.asarray(weights) > 0, 0, tokens)


def _real(family, batch):
  """`<bool>[rows]`, False where a row only fills the batch."""
  if 'decoder_target_tokens' not in batch:
    return jnp.ones(len(next(iter(batch.values()))), jnp.bool_)
  return jnp.any(family.target_weights(batch) > 0, axis=1)


def _stepper(family, params, batch, total):
  """How the logits of a position come about.

  Returns:
    `(whether it can begin at the end of a prompt, cache, (cache, said so far,
    position) -> (<float32>[rows, vocab], cache))`.
  """
  prefix = batch.get('decoder_causal_attention')
  if prefix is None or not is_decoder_only(family):
    cache = family.init_cache(params, batch, total)

    def cached(cache, said, at):
      before = jnp.where(at > 0, said[:, at - 1], 0)
      return family.decode_step(params, cache, before)

    return False, cache, cached
  room = total - prefix.shape[1]
  prefix = jnp.pad(jnp.asarray(prefix), ((0, 0), (0, room)))
  # The mark reaches one position further than the prompt: it is the last one
  # of the prompt, which the shift by one has put there.
  ahead = jnp.sum(prefix > 0, axis=1)

  def whole(cache, said, at):
    seen = jnp.maximum(at + 1, ahead)[:, None]
    known = jnp.arange(total, dtype=seen.dtype)[None] < seen
    row = {
      'decoder_input_tokens': jnp.pad(said, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': known.astype(jnp.int32),
      'decoder_causal_attention': prefix,
    }
    return family.logits(params, row)[:, at], cache

  return True, (), whole
