# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Changes made of blocks, places or shared matrices: seven small kinds."""

import numpy as np

from mergejax.checkpoints.peft import base


def miss(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W` plus one block `D` [r, outputs] repeated along the inputs.

  With `init_weights` 'mini', `D` is repeated along the outputs too; with 'bat'
  `D` is [outputs / r, r, r], and a block `W` [r, r] becomes `W + W D + D`.

  Source: Kang and Yin, MiSS, 2024, https://arxiv.org/abs/2409.15371.
  """
  block = layer.parts['miss_block']
  outputs, inputs = kernel.shape
  rank = block.shape[-1]
  way = layer.config.get('init_weights')
  if way == 'bat':
    cut = kernel.reshape(outputs // rank, rank, inputs // rank, rank)
    # [outputs / r, r, inputs / r, r] -> [inputs / r, outputs / r, r, r]
    change = cut.transpose(2, 0, 1, 3) @ block + block
    return kernel + change.transpose(1, 2, 0, 3).reshape(kernel.shape)
  rank = len(block)
  if way == 'mini':
    block = np.tile(block, (1, outputs // block.shape[1]))
  repeated = np.tile(block.T, (1, -(-inputs // rank)))
  return kernel + repeated[:, :inputs]


def c3a(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W` plus circulant blocks, divided by the inputs.

  Args:
    kernel: <float32>[outputs, inputs].
    layer: `c3a_kernel` [outputs / b, inputs / b, b], the first row of each
      block.

  Source: Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution,
  2024, https://arxiv.org/abs/2407.19342.
  """
  first = layer.parts['c3a_kernel']
  size = first.shape[-1]
  shift = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
  # [outputs / b, inputs / b, b, b] -> [outputs, inputs]
  blocks = first[:, :, shift].transpose(0, 2, 1, 3)
  return kernel + blocks.reshape(kernel.shape) / np.float32(kernel.shape[1])


def shira(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W` with numbers added at stored places.

  Source: Bhardwaj et al., Sparse High Rank Adapters, 2024,
  https://arxiv.org/abs/2406.13175.
  """
  rows, columns = layer.parts['shira_indices'].astype(np.int64)
  result = kernel.copy()
  np.add.at(result, (rows, columns), layer.parts['shira_weight'])
  return result


def delora(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + lambda / r B diag(1 / (|b_i| |a_i|)) A diag(w)`, `w` the stored norms.

  Source: Bini et al., DeLoRA, 2025, https://arxiv.org/abs/2503.18225.
  """
  a, b = layer.parts['delora_A'], layer.parts['delora_B']
  least = np.float32(1e-4)
  norms = np.maximum(np.linalg.norm(a, axis=1), least) * np.maximum(
    np.linalg.norm(b, axis=0), least
  )
  by = layer.parts['delora_lambda'] / np.float32(len(a)) / norms
  return kernel + (b * by) @ a * layer.parts['delora_w_norm']


def vera(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + diag(b) B diag(d) A`, with one `A` and `B` for all layers, cut to size.

  Source: Kopiczko et al., VeRA, 2023, https://arxiv.org/abs/2310.11454.
  """
  outputs, inputs = kernel.shape
  a = layer.shared['vera_A'][:, :inputs]
  b = layer.shared['vera_B'][:outputs]
  by_output = layer.parts['vera_lambda_b'][:, None]
  return kernel + (by_output * b) @ (layer.parts['vera_lambda_d'][:, None] * a)


def vblora(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + B A`, both put together from the vectors of one bank.

  Each piece of a row of `A` and of a column of `B` is the mean of the `topk`
  vectors with the largest logits, weighted by their softmax.

  Source: Li et al., VB-LoRA, 2024, https://arxiv.org/abs/2405.15179.
  """
  bank = layer.shared['vblora_vector_bank']
  # [r, pieces, length] -> [r, inputs]; [pieces, r, length] -> [outputs, r]
  a = _mixed(layer, 'vblora_logits_A', bank)
  b = _mixed(layer, 'vblora_logits_B', bank)
  a = a.reshape(len(a), -1)
  return kernel + b.transpose(0, 2, 1).reshape(-1, b.shape[1]) @ a


def _mixed(layer, name, bank):
  if name in layer.parts:
    logits = layer.parts[name]
    best = np.argsort(-logits, axis=-1, kind='stable')
    best = best[..., : int(layer.config.get('topk') or 2)]
    kept = np.take_along_axis(logits, best, -1)
    weights = np.exp(kept - kept.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
  else:
    best = layer.parts[f'{name}_topk_indices'].astype(np.int64)
    weights = layer.parts[f'{name}_topk_weights']
    # The last weight is left out: all of them sum to one.
    last = 1 - weights.sum(-1, keepdims=True)
    weights = np.concatenate([weights, last], -1)
  return np.einsum('...k,...kl->...l', weights, bank[best])


def randlora(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + alpha / r sum_j B_j diag(lambda_j) A diag(gamma_j)`, full rank.

  `A` has the smaller of inputs and outputs, and `B` the larger; where inputs
  are more, the sum is transposed.

  Args:
    kernel: <float32>[outputs, inputs].
    layer: `randlora_lambda` [r, bases], `randlora_gamma` [bases, smaller]; shared
      `randlora_A` [r, 1, >= smaller], `randlora_B` [>= larger, >= bases, r].

  Source: Albert et al., RandLoRA, 2025, https://arxiv.org/abs/2502.00987.
  """
  by, along = layer.parts['randlora_lambda'], layer.parts['randlora_gamma']
  rank, bases = by.shape
  small, large = sorted(kernel.shape)
  a = by[:, :, None] * layer.shared['randlora_A'][:, :, :small] * along
  b = layer.shared['randlora_B'][:large, :bases]
  # PEFT joins [bases, r] of the one with [r, bases] of the other, as they lie.
  delta = b.reshape(large, -1) @ a.reshape(-1, small)
  if kernel.shape[1] != small:
    delta = delta.T
  scale = layer.setting('randlora_alpha', 'alpha_pattern', 640) / rank
  return kernel + np.float32(scale) * delta


def gralora(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W` plus an own low-rank product in each of k x k blocks, and LoRA.

  Args:
    kernel: <float32>[outputs, inputs].
    layer: `gralora_A` [k, inputs / k, r], `gralora_B` [k, r, outputs / k]; and
      `gralora_A_general` [q, inputs], `gralora_B_general` [outputs, q].

  Source: Jung et al., GraLoRA, 2025, https://arxiv.org/abs/2505.20355.
  """
  a, b = layer.parts['gralora_A'], layer.parts['gralora_B']
  count, _, rank = a.shape
  # Of the r columns, each pair of blocks has r / k: n of inputs, m of outputs.
  a = a.reshape(count, -1, count, rank // count)
  b = b.reshape(count, count, rank // count, -1)
  delta = np.einsum('nims,mnso->moni', a, b).reshape(kernel.shape)
  if 'gralora_A_general' in layer.parts:
    general = layer.parts['gralora_A_general']
    delta = delta + layer.parts['gralora_B_general'] @ general
    rank += len(general)
  scale = layer.setting('alpha', 'alpha_pattern', 64) / rank
  return kernel + np.float32(scale) * delta
