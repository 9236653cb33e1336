# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Functions of a module and a batch, which now are methods of its family."""

from mergejax.models.registry import family_of

BATCH_STATS = 'batch_stats'


def check_batch(module, batch, source='the data'):
  try:
    family = family_of(module)
  except ValueError:
    return
  family.check_batch(batch, source)


def logits(module, params, batch, key=None):
  family = family_of(module)
  return family.call(
    family.variables(params), batch, train=key is not None,
    rngs=None if key is None else {'dropout': key},
  )[0]  # fmt: skip


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
