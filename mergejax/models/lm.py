# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoder-only language models, and what all models of text share."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing
from mergejax.models import base
from mergejax.models import layer_stacks
from mergejax.models import registry
from mergejax.names import t5x
from mergejax.nn import lm
from mergejax.nn import moe_metrics
from mergejax.nn import transformer

_OF_EXPERTS = re.compile(r'.*/expert/\w+/kernel')
_WEIGHTS = ('decoder_loss_weights', 'weights')


class TextFamily(base.ModelFamily):
  """Models whose batches have seqio's names, with T5X's call signature.

  A batch has `decoder_input_tokens` and `decoder_target_tokens`, `<int32>
  [batch, length]`, 0 for padding; optionally `decoder_loss_weights`,
  `decoder_segment_ids` and whatever else `optional` names.

  Attributes:
    optional: names that a call takes where a batch has them.
    scanned: whether the layers are stacked in one, see `nn.stack`.
    moe: of its sparse layers, see `nn.moe_config`; None if it has none.
  """

  axes = t5x.AXES
  sizes = {
    'vocab_size': (
      'encoder_input_tokens',
      'decoder_input_tokens',
      'decoder_target_tokens',
    )
  }
  optional: tuple[str, ...] = ('decoder_segment_ids',)

  def __init__(self, module):
    super().__init__(module)
    # Modules of others have configurations of their own, or none.
    self.scanned = bool(getattr(self.config, 'scan_layers', False))
    self.moe = getattr(self.config, 'moe', None)
    if self.moe is not None:
      self.axes = t5x.SPARSE
    if self.scanned:
      self.axes = t5x.scanned(self.axes, self.config.param_scan_axis)

  def arguments(self, batch, *, train=False):
    positional = [batch['decoder_input_tokens'], batch['decoder_target_tokens']]
    named = {name: batch[name] for name in self.optional if name in batch}
    named['enable_dropout'] = bool(self.rng_streams(train=train))
    return positional, named

  def rng_streams(self, *, train):
    # Also where nothing is dropped: routers have a training mode of their own.
    if train and self.moe is not None:
      return ('dropout',)
    return super().rng_streams(train=train)

  def apply(self, variables, batch, *, train=False, rngs=None, mutable=()):
    if self.moe is None:
      return super().apply(
        variables, batch, train=train, rngs=rngs, mutable=mutable
      )
    left = moe_metrics.COLLECTION
    found = super().apply(
      variables, batch, train=train, rngs=rngs, mutable=[*mutable, left]
    )
    losses, metrics = moe_metrics.totals(self.moe, found.mutable.get(left, {}))
    asked = {
      n: x for n, x in found.mutable.items() if n != left or n in mutable
    }
    return found._replace(losses=losses, metrics=metrics, mutable=asked)

  def call(self, variables, batch, *, train=False, rngs=None, mutable=()):
    # Without a key there is nothing to draw dropout from.
    train = train and bool(rngs)
    return super().call(
      variables, batch, train=train, rngs=rngs, mutable=mutable
    )

  def targets(self, batch):
    return batch['decoder_target_tokens']

  def given_weights(self, batch):
    for name in _WEIGHTS:
      if batch.get(name) is not None:
        return batch[name]
    return batch['decoder_target_tokens'] > 0

  def segments(self, batch):
    return batch.get('decoder_segment_ids')

  def with_targets(self, batch, targets):
    # The models take their padding mask from the targets.
    return {
      **{n: x for n, x in batch.items() if n not in _WEIGHTS},
      'decoder_input_tokens': jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': jnp.maximum(targets, 1),
    }

  def example_batch(self, rows=1, *, length=1):
    names = ('decoder_input_tokens', 'decoder_target_tokens')
    return {name: jnp.ones((rows, length), jnp.int32) for name in names}

  def mask(self, path: typing.Path, batch: Mapping[str, Any]):
    if _OF_EXPERTS.fullmatch(path):
      return base.NONZERO
    return batch['decoder_target_tokens'] > 0

  def in_form(self, specs):
    ours = isinstance(self.config, transformer.StackConfig)
    return not ours or layer_stacks.in_form(specs, self.config)

  def arranged(self, leaves, axes=None):
    return layer_stacks.restack(leaves, self.config, axes)

  def stored_as(self, specs):
    if layer_stacks.in_form(specs, self.config):
      return self
    config = layer_stacks.form_of(specs, self.config)
    return type(self)(type(self.module)(config))

  def cache_rows(self, path, leaf):
    # Inputs are read once for all answers to them.
    if not path.endswith(('cached_key', 'cached_value')):
      return None
    return 1 if self.scanned else 0


def with_ones(
  batch: base.Batch, names: Sequence[str], length: int
) -> dict[str, Any]:
  """A batch whose rows begin with some positions of token 1, which is real."""
  room = lambda x: jnp.pad(
    jnp.asarray(x), ((0, 0), (length, 0)), constant_values=1
  )
  return {**batch, **{name: room(batch[name]) for name in names}}


def check_unpacked(batch: base.Batch, name: str) -> None:
  """Raises a `DataError` for packed rows, which a prompt cannot come before."""
  if name in batch:
    raise errors.DataError(
      f'A batch of packed rows ({name}) has no place for a prompt before each of '
      'its examples: do not pack (pack=False).'
    )


@registry.register
class LMFamily(TextFamily):
  """The decoder-only model of `nn.lm`."""

  model_type = 'lm'
  config_class = lm.LMConfig
  module_class = lm.LanguageModel
  optional = ('decoder_segment_ids', 'decoder_causal_attention')
  decodes = True
  embedded = ('decoder/token_embedder', 'result')

  def with_room(self, batch, length):
    check_unpacked(batch, 'decoder_segment_ids')
    names = ('decoder_input_tokens', 'decoder_target_tokens')
    optional = [n for n in ('decoder_causal_attention',) if n in batch]
    return with_ones(batch, (*names, *optional), length)

  def features_layer(self, specs):
    head = 'decoder/logits_dense/kernel'
    return head if head in specs else 'decoder/token_embedder/embedding'

  def init_cache(self, params, batch, length):
    rows = batch['decoder_input_tokens'].shape[0]
    empty = jnp.ones((rows, length), jnp.int32)
    shapes = jax.eval_shape(
      lambda: self.module.init(
        jax.random.key(0), empty, empty, decode=True, max_decode_length=length
      )
    )['cache']
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def decode_step(self, params, cache, tokens):
    row = tokens[:, None]
    found, changed = self.module.apply(
      {**self.variables(params), 'cache': cache},
      row,
      jnp.ones_like(row),
      decode=True,
      mutable=['cache'],
    )
    return found[:, 0], changed['cache']
