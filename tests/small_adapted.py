# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small models to adapt, batches for them, and leaves that do something."""

import re

import drawn
import jax.numpy as jnp
import numpy as np
import small_batches

from mergejax import models
from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import t5_hf
from mergejax.nn import t5

SIZES = dict(vocab_size=24, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=12)
MODELS = {
  't5': dict(
    model_type='t5x', num_encoder_layers=2, num_decoder_layers=2, **SIZES
  ),
  'lm': dict(model_type='lm', num_layers=2, **SIZES),
}


def build(kind, **changes):
  """`(family, params)` of a small model."""
  family = models.family_of(models.build(MODELS[kind] | changes))
  return family, drawn.params(family)


def batch(rows=8, seed=0):
  """Inputs and targets with padding; decoders ignore the inputs."""
  return small_batches.text_batches(1, rows, seed)[0]


def decoded(family, params, given, tokens, steps):
  """Logits `[answers, steps, vocab]` with two answers to every row of a batch.

  Args:
    family: of the model.
    params: of the model.
    given: the batch.
    tokens: `<int32>[2 * rows]`, which every step is told.
    steps: how many.
  """

  def doubled(path, leaf):
    axis = family.cache_rows(path, leaf)
    return leaf if axis is None else jnp.repeat(leaf, 2, axis=axis)

  cache = tree.map_paths(doubled, family.init_cache(params, given, steps))
  found = []
  for _ in range(steps):
    logits, cache = family.decode_step(params, cache, tokens)
    found.append(logits)
  return jnp.stack(found, axis=1)


def leaves(specs, seed=0):
  """An adapter's leaves that are nothing special, none of them 0."""
  rng = np.random.default_rng(seed)
  draw = lambda spec: rng.normal(0.6, 0.4, spec.shape).astype(np.float32)
  return tree.unflatten({path: draw(spec) for path, spec in specs.items()})


def of_golden(arrays, *, tied):
  """`(family, params)` of a T5 in a golden file."""
  config = {
    name.removeprefix('config/'): value.item()
    for name, value in arrays.items()
    if name.startswith('config/')
  }
  config['feed_forward_proj'] = 'relu' if tied else 'gated-gelu'
  config['tie_word_embeddings'] = tied
  module = t5.Transformer(t5.T5Config(**t5_hf.config_from_hf(config)))
  given = {
    name: value
    for name, value in _below(arrays, 'params/').items()
    if not re.match(r'.*prefix|encoder\.(attn_W|layer_norm)', name)
  }
  leaves = t5_hf.from_hf(given, tied_head=tied)
  return models.family_of(module), tree.unflatten(leaves)


def scales_of_golden(arrays, prefix, suffix=''):
  """Leaves of (IA)^3 from vectors by Hugging Face's names."""
  given = {
    f'{name.removesuffix(suffix)}.weight': value
    for name, value in _below(arrays, prefix).items()
  }
  return tree.unflatten({
    path.replace('/kernel', '/ia3_scale'): value.reshape(-1)
    for path, value in t5_hf.from_hf(given, tied_head=False).items()
  })  # fmt: skip


def _below(arrays, prefix):
  return {
    name.removeprefix(prefix): value
    for name, value in arrays.items()
    if name.startswith(prefix)
  }


def table(width):
  """The spec of a table of tokens, all that prompts ask of a base."""
  return typing.LeafSpec((100, width), np.dtype('float32'), ('vocab', 'embed'))


def attempt_of_golden(arrays):
  """ATTEMPT's sub-network from PyTorch's layers."""
  given = _below(arrays, 'params/encoder.')
  return {
    'attempt/down': given['attn_W_down.weight'].T,
    'attempt/up': given['attn_W_up.weight'].T,
    'attempt/norm/scale': given['layer_norm.weight'],
    'attempt/norm/bias': given['layer_norm.bias'],
  }
