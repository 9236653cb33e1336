# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: families of architectures, and modules from checkpoints and back."""

from mergejax.models.base import ModelFamily
from mergejax.models.base import Outputs
from mergejax.models.classifier import Classifier
from mergejax.models.loading import is_hugging_face
from mergejax.models.loading import load_model
from mergejax.models.loading import load_module
from mergejax.models.registry import build
from mergejax.models.registry import describe
from mergejax.models.registry import family_class
from mergejax.models.registry import family_of
from mergejax.models.registry import names
from mergejax.models.registry import register

__all__ = [
  'Classifier', 'ModelFamily', 'Outputs', 'build', 'describe', 'family_class',
  'family_of', 'is_hugging_face', 'load_model', 'load_module', 'names',
  'register',
]  # fmt: skip


BATCH_STATS = 'batch_stats'


def example_batch(module, rows=1, *, length=1):
  return family_of(module).example_batch(rows, length=length)


def arguments(batch):
  if 'images' in batch:
    return [batch['images']], {}
  names = ('encoder_segment_ids', 'decoder_segment_ids')
  if 'encoder_input_tokens' in batch:
    positional = [batch['encoder_input_tokens']]
  else:
    positional = []
    names = ('decoder_segment_ids', 'decoder_causal_attention')
  positional += [batch['decoder_input_tokens'], batch['decoder_target_tokens']]
  return positional, {name: batch[name] for name in names if name in batch}


def check_batch(module, batch, source='the data'):
  try:
    family = family_of(module)
  except ValueError:
    return
  family.check_batch(batch, source)


def variables(params):
  if BATCH_STATS not in params:
    return {'params': params}
  rest = {name: leaf for name, leaf in params.items() if name != BATCH_STATS}
  return {'params': rest, BATCH_STATS: params[BATCH_STATS]}


def logits(module, params, batch, key=None):
  family = family_of(module)
  return family.call(
    family.variables(params), batch, train=key is not None,
    rngs=None if key is None else {'dropout': key},
  )[0]  # fmt: skip


def answer_logits(module, answers):
  return family_of(module).answer_logits(answers)


def training_logits(module, params, batch, key=None):
  family = family_of(module)
  outputs = family.apply(
    family.variables(params), batch, train=True,
    rngs=None if key is None else {'dropout': key},
  )  # fmt: skip
  return outputs.logits, outputs.mutable.get(BATCH_STATS)


def targets(batch):
  import jax.numpy as jnp

  if 'images' in batch:
    return jnp.asarray(batch['labels'], jnp.int32)
  return jnp.asarray(batch['decoder_target_tokens'])


def given_weights(batch):
  import numpy as np

  weights = batch.get('decoder_loss_weights', batch.get('weights'))
  if weights is not None:
    return weights
  if 'images' in batch:
    return np.ones(batch['labels'].shape, np.bool_)
  return batch['decoder_target_tokens'] > 0


def target_weights(batch):
  import jax.numpy as jnp

  return jnp.asarray(given_weights(batch)).astype(jnp.float32)


def init_params(module, key):
  import jax

  return jax.jit(family_of(module).init)(key)


def param_specs(module):
  return family_of(module).specs()
