# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoHa and LoKr: low-rank changes by Hadamard and by Kronecker products."""

import numpy as np

from mergejax.checkpoints.peft import base


def loha(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + alpha / r (w1_a w1_b) * (w2_a w2_b)`, element by element.

  Args:
    kernel: <float32>[outputs, inputs, ...].
    layer: `hada_w1_a` [outputs, r], `hada_w1_b` [r, inputs ...], and `w2`; or
      for convolutions `hada_t1` [r, r, ...] with [r, outputs], [r, inputs].

  Source: Hyeon-Woo et al., FedPara, 2021, https://arxiv.org/abs/2108.06098,
  propositions 1 and 3.
  """
  parts = layer.parts
  one = _factor(parts, 'hada_t1', 'hada_w1_a', 'hada_w1_b')
  two = _factor(parts, 'hada_t2', 'hada_w2_a', 'hada_w2_b')
  by = np.float32(_scale(layer, len(parts['hada_w1_b'])))
  return kernel + by * (one * two).reshape(kernel.shape)


def lokr(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + alpha / r w1 (x) w2`, the Kronecker product; `w = w_a w_b` if split.

  The `r` of the settings counts, since a product that is stored whole has none.

  Source: Yeh et al., LyCORIS, 2023, https://arxiv.org/abs/2309.14859.
  """
  parts = layer.parts
  factors = []
  for whole, core, a, b in (
    ('lokr_w1', None, 'lokr_w1_a', 'lokr_w1_b'),
    ('lokr_w2', 'lokr_t2', 'lokr_w2_a', 'lokr_w2_b'),
  ):
    factors.append(
      parts[whole] if whole in parts else _factor(parts, core, a, b)
    )
  one, two = factors
  if two.ndim > 2:
    one = one.reshape(*one.shape, *(1,) * (two.ndim - 2))
  rank = layer.setting('r', 'rank_pattern', 8)
  by = np.float32(_scale(layer, rank))
  return kernel + by * np.kron(one, two).reshape(kernel.shape)


def _factor(parts, core, a, b):
  """`a b`; with a core, `sum_ij core[i, j, ...] a[i, :] b[j, :]`."""
  if core in parts:
    return np.einsum('ij...,ip,jq->pq...', parts[core], parts[a], parts[b])
  return parts[a] @ parts[b].reshape(len(parts[b]), -1)


def _scale(layer, rank):
  return layer.setting('alpha', 'alpha_pattern', 8) / rank
