# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of tiny models on tiny data, for tests of the trainer."""

import jax
import numpy as np
import optax

from mergejax import models
from mergejax import partition
from mergejax import training


def pictures(count=16, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'images': rng.uniform(size=(count, 8, 8, 1)).astype(np.float32),
    'labels': rng.integers(0, 3, count).astype(np.int32),
  }


def mlp(**changes):
  fields = dict(model_type='mlp', hidden=(5,), image_shape=(8, 8, 1), classes=3)
  return models.build(fields | changes)


def one_device():
  return partition.make_mesh(devices=jax.devices()[:1])


def losses_of(
  model, steps, data, *, batch_size=8, directory=None, key=0, **settings
):
  """`(loss of every step, the trained state)`."""
  seen = []
  callbacks = [
    *settings.pop('callbacks', ()),
    training.callbacks.on_log(lambda _, m: seen.append(float(m['loss']))),
  ]
  settings.setdefault('optimizer', optax.sgd(0.2))
  optimizer = settings.pop('optimizer')
  trainer = training.Trainer(model, optimizer, callbacks=callbacks, **settings)
  state = trainer.fit(
    training.ArrayStream(data, batch_size, seed=1), steps=steps, log_every=1,
    directory=directory, key=jax.random.key(key),
  )  # fmt: skip
  return seen, state
