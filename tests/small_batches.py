# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small models and batches, and Gram matrices by hand, to test statistics."""

import numpy as np

from mergejax import models

TEXT_MODEL = dict(
  model_type='t5x', vocab_size=24, emb_dim=8, num_heads=2, head_dim=3,
  mlp_dim=10, num_encoder_layers=1, num_decoder_layers=1,
  logits_via_embedding=True,
)  # fmt: skip


def text_batches(count=3, rows=8, seed=0):
  """Batches with padding on both sides."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(count):
    batch = {}
    for name, length in (('encoder_input', 6), ('decoder_target', 5)):
      tokens = rng.integers(1, 24, (rows, length))
      sizes = rng.integers(2, length + 1, rows)
      tokens[np.arange(length) >= sizes[:, None]] = 0
      batch[f'{name}_tokens'] = tokens
    targets = batch['decoder_target_tokens']
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    result.append({**batch, 'decoder_input_tokens': shifted})
  return result


def tiny_images(count=1):
  """`(module, batches)` of a small image classifier."""
  module = models.build(
    dict(model_type='mlp', hidden=(5,), image_shape=(2, 2, 1), classes=3)
  )
  rng = np.random.default_rng(0)
  batch = lambda: {
    'images': rng.random((16, 2, 2, 1), np.float32),
    'labels': rng.integers(0, 3, 16),
  }
  return module, [batch() for _ in range(count)]


def sown(module, params, batch):
  """For `gram(apply=...)`: what a module of one argument leaves behind."""
  left = module.apply({'params': params}, batch['x'], mutable='intermediates')
  return left[1]


def gram_of(rows):
  """`X^T X / n` of all positions, in float64."""
  rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
  return rows.T @ rows / len(rows)
