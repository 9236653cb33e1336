# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters that multiply: (IA)^3 and HiRA."""

import re

import numpy as np

from mergejax.checkpoints.peft import base


def ia3(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`l W` by outputs, or `W l` by inputs for feed-forward layers.

  Args:
    kernel: <float32>[outputs, inputs, ...]; of a convolution in g groups
      [outputs, inputs / g, ...].
    layer: `ia3_l` [outputs, 1] or [1, inputs]; [1, n, 1, ...] for both in a
      convolution.

  Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and
  Cheaper than In-Context Learning, 2022, https://arxiv.org/abs/2205.05638.
  """
  vector = layer.parts['ia3_l'].reshape(-1)
  more = (1,) * (kernel.ndim - 2)
  if not _by_inputs(layer):
    return kernel * vector.reshape(-1, 1, *more)
  inputs = vector.reshape(-1, kernel.shape[1])
  rows = np.repeat(inputs, len(kernel) // len(inputs), axis=0)
  return kernel * rows.reshape(*rows.shape, *more)


def ia3_bias(vector: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`l b`, since outputs are multiplied whole; `b` for feed-forward layers."""
  if _by_inputs(layer):
    return vector
  return vector * layer.parts['ia3_l'].reshape(-1)


def _by_inputs(layer):
  shape = layer.parts['ia3_l'].shape
  if len(shape) == 2 and shape != (1, 1):
    return shape[0] == 1
  names = layer.config.get('feedforward_modules') or ()
  if isinstance(names, str):
    return re.fullmatch(names, layer.module) is not None
  return any(layer.module.endswith(name) for name in names)


def hira(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W (1 + B A)`, element by element.

  Source: Huang et al., HiRA, 2025, https://openreview.net/forum?id=TwJrTz9cRS.
  """
  a = layer.part('hira_A', 'hira_embedding_A')
  b = layer.part('hira_B', 'hira_embedding_B')
  product = b.reshape(-1, len(a)) @ a.reshape(len(a), -1)
  return kernel * (1 + product.reshape(kernel.shape))
