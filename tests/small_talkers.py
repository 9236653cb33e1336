# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models that say nothing but a, b and the end, differently to every input."""

import jax
import numpy as np

from mergejax import models

SIZES = dict(vocab_size=384, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)
END, A, B = 1, ord('a') + 3, ord('b') + 3


def build(kind):
  """A model that says nothing but a, b and the end."""
  layers = {'num_layers': 1}
  if kind == 't5x':
    layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  module = models.build(dict(model_type=kind, **SIZES, **layers))
  params = jax.jit(models.family_of(module).init)(
    jax.random.key(int(kind == 't5x'))
  )
  params = jax.tree.map(lambda leaf: 3 * leaf, params)
  head = np.array(params['decoder']['logits_dense']['kernel'])
  kept = head[:, [A, END]]
  head[:] = 0
  head[:, A], head[:, B], head[:, END] = kept[:, 0], -kept[:, 0], kept[:, 1]
  params['decoder']['logits_dense']['kernel'] = head
  return module, params
