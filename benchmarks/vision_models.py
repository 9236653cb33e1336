# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small image classifiers on real images, for the benchmarks.

Needs the data folder in MERGEJAX_DATA; trained models are kept in a cache.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import real_data

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.core import tree as tree_lib
from mergejax.data import images
from mergejax.evaluation import base as evaluation
from mergejax.training import arrays
from mergejax.training import losses
from mergejax.training import objective
from mergejax.training import step as step_lib

TASKS = ('mnist', 'notmnist', 'usps', 'omniglot_alphabets')


@functools.cache
def load(task: str, split: str) -> dict[str, np.ndarray]:
  """A task's images and labels; CIFAR-10 becomes grey and 28 x 28."""
  found = images.load(f'vision/{task}', split)
  pixels = found['images']
  if task == 'cifar10':
    pixels = pixels.mean(axis=-1)[:, 2:30, 2:30].astype(np.uint8)
  return {'images': pixels, 'labels': found['labels']}


def classes(task: str) -> int:
  """Number of labels of a task."""
  return int(load(task, 'train')['labels'].max()) + 1


def train(
  module, params, data, *, steps, learning_rate, seed, batch_size=64,
  weight_decay=0.0, freeze=None, augment=False,
):  # fmt: skip
  """Trains with AdamW and a cosine decay; `freeze` is a path prefix."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(50, steps // 5), steps
  )
  optimizer = optax.adamw(schedule, weight_decay=weight_decay)
  if freeze is not None:
    labels = tree_lib.map_paths(
      lambda path, _: 'still' if path.startswith(freeze) else 'free', params
    )
    optimizer = optax.multi_transform(
      {'free': optimizer, 'still': optax.set_to_zero()}, labels
    )
  made = step_lib.make_step(
    module, optimizer, objective=objective.cross_entropy(z_loss=0.0)
  )
  step = jax.jit(made.update, donate_argnums=0)
  state = made.init(jax.tree.map(jnp.array, params), jax.random.key(seed))
  stream = arrays.ArrayStream(data, batch_size, seed=seed)
  rng = np.random.default_rng(seed)
  for _ in range(steps):
    batch = next(stream)
    if augment:
      shift = rng.integers(-2, 3, 2)
      batch['images'] = np.roll(batch['images'], shift, axis=(1, 2))
    state, _ = step(state, batch)
  return jax.device_get(state.params)


def cached(name: str, make):
  """What `make` gives, from the cache if it is there."""
  path = real_data.cache_folder() / f'{name}.npz'
  if path.exists():
    return checkpoint.open_checkpoint(path).read()
  params = make()
  checkpoint.save_checkpoint(path, params)
  return params


def evaluator(module, data, size=200) -> evaluation.Evaluator:
  """Negative loss, and accuracy, on a split, to be compiled with a merge."""
  count = len(data['labels']) // size * size
  stacked = {
    n: jnp.asarray(x[:count].reshape(-1, size, *x.shape[1:]))
    for n, x in data.items()
  }

  def score(params, data):
    def one(batch):
      logits = models.family_of(module).logits(params, batch)
      loss, _ = losses.token_cross_entropy(logits, batch['labels'])
      right = logits.argmax(-1) == batch['labels']
      return loss.mean(), right.mean(dtype=jnp.float32)

    loss, right = jax.lax.map(one, data)
    return {'loss': -loss.mean(), 'accuracy': right.mean()}

  return evaluation.Evaluator(score, jax.device_put(stacked))


def scorer(module, data, size=200):
  """`params -> {'loss': ..., 'accuracy': ...}`, compiled once."""
  compiled = evaluator(module, data, size).compiled()

  def scores(params):
    found = compiled(params)
    return {**found, 'loss': -found['loss']}

  return scores
