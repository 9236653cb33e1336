# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A language model without a layer, and what decoding is compared with.

Its logits are a row of a table, picked by a number that every token changes: a
program of it compiles at once, and NumPy can follow it.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mergejax.models import lm

STATES = 61


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = 6


class Table(nn.Module):
  config: Config = Config()

  @nn.compact
  def __call__(self, inputs, targets, enable_dropout=False):
    return jnp.zeros((*inputs.shape, self.config.vocab_size))


class TableFamily(lm.TextFamily):
  """Decodes; has no other use."""

  model_type = 'table'
  module_class = Table
  optional = ()
  decodes = True

  def init_cache(self, params, batch, length):
    rows = len(batch['decoder_target_tokens'])
    return {'state': jnp.zeros(rows, jnp.int32), 'step': jnp.zeros((), int)}

  def cache_rows(self, path, leaf):
    return super(lm.TextFamily, self).cache_rows(path, leaf)

  def decode_step(self, params, cache, tokens):
    state = (7 * cache['state'] + 3 * tokens + 5) % STATES
    return params[state], {'state': state, 'step': cache['step'] + 1}


def family(vocab=6):
  return TableFamily(Table(Config(vocab)))


def table(vocab=6, seed=0, scale=1.5):
  """`<float32>[states, vocab]`: the parameters."""
  drawn = np.random.default_rng(seed).normal(size=(STATES, vocab))
  return (scale * drawn).astype(np.float32)


def batch(prompts, width=8):
  """Prompts as seqio's prefix features give them; an empty one has one too."""
  tokens = np.zeros((len(prompts), width), np.int32)
  weights = np.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt) + 1] = [*prompt, 5]
    weights[i, len(prompt)] = 1
  return {
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': weights,
  }


def log_probabilities(params, tokens):
  """`<float64>[vocab]` of the token after those given, the first of which is 0."""
  state = 0
  for token in (0, *tokens):
    state = (7 * state + 3 * token + 5) % STATES
  logits = params[state].astype(np.float64)
  return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def log_likelihood(params, prompt, answer):
  """Of an answer without what pads it."""
  return sum(
    log_probabilities(params, [*prompt, *answer[:i]])[token]
    for i, token in enumerate(answer)
  )
