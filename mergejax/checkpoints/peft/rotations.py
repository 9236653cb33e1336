# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters that turn a kernel: OFT, BOFT, HRA and RoAd."""

import numpy as np

from mergejax.checkpoints.peft import base


def oft(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W R^T` with a block-diagonal `R`, each block a Cayley transform.

  `(I + Q)^-1 (I - Q)` of the skew-symmetric `Q` whose upper triangle is stored;
  with `use_cayley_neumann` its series `I - 2 Q + 2 Q^2 ...` as PEFT truncates
  it, in PEFT's sign of `Q`.

  Args:
    kernel: <float32>[outputs, inputs].
    layer: `oft_R` [blocks, size (size - 1) / 2], one block if all share it.

  Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal
  Finetuning, 2023, https://arxiv.org/abs/2306.07280; Qiu et al., Orthogonal
  Finetuning Made Scalable, 2025, https://arxiv.org/abs/2506.19847.
  """
  stored = layer.part('oft_R', 'oft_embedding_R')
  # size (size - 1) / 2 = elements
  size = round((1 + np.sqrt(1 + 8 * stored.shape[1])) / 2)
  skew = np.zeros((len(stored), size, size), np.float32)
  rows, columns = np.triu_indices(size, 1)
  skew[:, rows, columns] = stored
  skew -= skew.transpose(0, 2, 1)
  if layer.config.get('coft'):
    skew = _near_identity(skew, float(layer.config.get('eps', 6e-5)))
  if layer.config.get('use_cayley_neumann', True):
    terms = int(layer.config.get('num_cayley_neumann_terms') or 5)
    rotation = _neumann(skew, terms)
  else:
    rotation = _cayley(skew)
  if 'oft_embedding_R' in layer.parts:
    rotation = rotation.transpose(0, 2, 1)  # rows come out, not in: W R
  return _turn(kernel, rotation)


def _turn(kernel, rotation):
  """Each run of inputs through its own block, `[outputs, blocks, size]`."""
  size = rotation.shape[-1]
  runs = kernel.reshape(len(kernel), -1, size)
  # (R W^T)^T = W R^T, block by block.
  turned = np.einsum('onk,nck->onc', runs, np.broadcast_to(
    rotation, (runs.shape[1], size, size)
  ))  # fmt: skip
  return turned.reshape(kernel.shape)


def _cayley(skew):
  eye = np.eye(skew.shape[-1], dtype=np.float32)
  # X (I + Q) = I - Q; the two commute, so the order does not matter.
  return np.linalg.solve(eye + skew, np.broadcast_to(eye, skew.shape) - skew)


def _neumann(skew, terms):
  """`I + 2 Q + 2 Q^2 + ...`, of which PEFT adds the last power but once."""
  total = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape)
  if terms == 2:
    return total + 2 * skew
  power = skew
  last = max(terms, 4) - 1  # three terms are four
  for _ in range(1, last):
    total = total + 2 * power
    power = power @ skew
  return total + power


def _near_identity(skew, eps):
  """COFT: blocks longer than `eps` / sqrt(blocks) are shortened to it."""
  bound = eps / np.sqrt(len(skew))
  norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
  return np.where(
    norm <= bound, skew, skew * bound / np.maximum(norm, 1e-30)
  ).astype(np.float32)


def boft(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`diag(s) W R^T` with `R` a product of butterflies: blocks, rearranged.

  Args:
    kernel: <float32>[outputs, inputs, ...].
    layer: `boft_R` [factors, blocks, size, size], whose skew-symmetric part
      counts; `boft_s` [outputs].

  Source: Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly
  Factorization, 2023, https://arxiv.org/abs/2311.06243.
  """
  stored = layer.parts['boft_R']
  factors, blocks, size, _ = stored.shape
  flat = kernel.reshape(len(kernel), -1).T
  for factor, generator in enumerate(stored):
    rotation = _cayley(0.5 * (generator - generator.transpose(0, 2, 1)))
    order = np.arange(blocks * size)
    if factors > 1:
      # Halves of blocks: first those at even places, then those at odd ones.
      halves = order.reshape(blocks >> factor, -1, size // 2)
      order = np.concatenate([halves[:, ::2], halves[:, 1::2]], 1).reshape(-1)
    spread = np.empty_like(flat)
    spread[order] = flat
    turned = rotation @ spread.reshape(blocks, size, -1)
    flat = turned.reshape(flat.shape)[order]
  scale = layer.parts['boft_s'].reshape(-1, 1)
  return (scale * flat.T).reshape(kernel.shape)


def hra(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)` with unit vectors `u`.

  With `apply_GS` the vectors are made orthogonal first, one after another.

  Args:
    kernel: <float32>[outputs, inputs, ...].
    layer: `hra_u` [inputs ..., r].

  Source: Yuan et al., Bridging the Gap between Low-rank and Orthogonal
  Adaptation via Householder Reflection Adaptation, 2024,
  https://arxiv.org/abs/2405.17484.
  """
  flat = kernel.reshape(len(kernel), -1)
  units = []
  for u in layer.parts['hra_u'].T:
    if layer.config.get('apply_GS'):
      for other in units:
        u = u - (other @ u) * other
    units.append(u / np.linalg.norm(u))
    flat = flat - 2 * np.outer(flat @ units[-1], units[-1])
  return flat.reshape(kernel.shape)


def road(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`R W`: pairs of outputs, half a group apart, turned and scaled.

  Source: Liao and Monz, 3-in-1: 2D Rotary Adaptation, 2024,
  https://arxiv.org/abs/2409.00119.
  """
  return _road(kernel, layer)


def road_bias(vector: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`R b`, since outputs are turned whole."""
  return _road(vector[:, None], layer)[:, 0]


def _road(rows, layer):
  size = int(layer.config.get('group_size') or 64)
  half = size // 2
  variant = layer.config.get('variant') or 'road_1'
  angle, length = layer.parts['road_theta'], layer.parts['road_alpha']
  if variant == 'road_4':
    # Own numbers for the cosine and for the sine of every output.
    angle, length = angle.reshape(-1, 2, size), length.reshape(-1, 2, size)
    cosine = length[:, 0] * np.cos(angle[:, 0])
    sine = length[:, 1] * np.sin(angle[:, 1])
  else:
    cosine, sine = length * np.cos(angle), length * np.sin(angle)
    if variant == 'road_1':  # both of a pair use the same
      cosine, sine = (
        np.repeat(x.reshape(-1, half), 2, axis=0) for x in (cosine, sine)
      )
  pairs = rows.reshape(-1, 2, half, rows.shape[-1])
  cosine, sine = (x.reshape(-1, 2, half, 1) for x in (cosine, sine))
  swapped = np.stack([-pairs[:, 1], pairs[:, 0]], axis=1)
  return (cosine * pairs + sine * swapped).reshape(rows.shape)
