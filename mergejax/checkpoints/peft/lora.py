# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA and its relatives: `W + s B A`, and where `W` itself is another."""

import math

import numpy as np

from mergejax.checkpoints.peft import base
from mergejax.core import errors

# Settings of LoraConfig that do not change what an adapter does once trained,
# and those that are followed here. Any other that is set is refused: a later
# variant would otherwise be folded as plain LoRA.
KNOWN = frozenset({
  'alpha_pattern', 'auto_mapping', 'base_model_name_or_path', 'bias',
  'corda_config', 'ensure_weight_tying', 'eva_config', 'exclude_modules',
  'fan_in_fan_out', 'inference_mode', 'init_lora_weights', 'kasa_config',
  'layers_pattern', 'layers_to_transform', 'loftq_config', 'lora_alpha',
  'lora_bias', 'lora_dropout', 'lora_ga_config', 'megatron_core',
  'modules_to_save', 'monteclora_config', 'peft_type', 'peft_version',
  'qalora_group_size', 'r', 'rank_pattern', 'revision', 'runtime_config',
  'target_modules', 'target_parameters', 'task_type',
  'trainable_token_indices', 'use_dora', 'use_rslora', 'velora_config',
})  # fmt: skip
REASONS = {
  'alora_invocation_tokens': 'it is an activated LoRA, which acts on the tokens '
  'after its invocation only: no single weight does that',
  'arrow_config': 'Arrow chooses among adapters for every token: no single '
  'weight does that',
  'layer_replication': 'it was trained on a model with repeated layers. Make '
  'that model first, by a passthrough recipe with `slices`, then set '
  'layer_replication to null in adapter_config.json',
  'megatron_config': 'it was trained on Megatron layers, whose kernels are '
  'split and named in another way. Export the merged model from Megatron',
  'use_qalora': 'QA-LoRA averages groups of inputs of a quantised model. Merge '
  "with PEFT's merge_and_unload()",
  'use_bdlora': 'the matrices of BD-LoRA are blocks on a diagonal. Merge with '
  "PEFT's merge_and_unload()",
}
# Initialisations that take a part out of the base model.
_LOST = {
  'corda': 'CorDA takes principal parts, found with data, out of the base',
  'loftq': 'LoftQ quantises the base',
  'lora_ga': 'LoRA-GA takes parts, found with gradients, out of the base',
}


def refuse(config) -> str | None:
  """Why an adapter of these settings cannot be folded; None if it can."""
  for key, value in config.items():
    if key not in KNOWN and value not in (None, False, [], {}, '', 'none'):
      reason = REASONS.get(
        key, 'that setting is not known here. Merge with PEFT first'
      )
      return f'{key} is set: {reason}'
  start = config.get('init_lora_weights')
  if isinstance(start, str) and start not in ('pissa', 'olora'):
    start = start.lower()
    if start.startswith('pissa'):
      return (
        f"init_lora_weights is {start!r}: PiSSA's approximate decomposition is "
        f'random, so that the rest of the base cannot be made again. {_CONVERT}'
      )
    if start in _LOST:
      return f'init_lora_weights is {start!r}: {_LOST[start]}. {_CONVERT}'
    if start not in ('gaussian', 'orthogonal', 'eva', 'mica', 'true'):
      return f'init_lora_weights is {start!r}, which is not known here'
  return None


def beyond_products(config) -> str | None:
  """Why an adapter does more than add `s B A` to kernels; None if it does not.

  Args:
    config: `adapter_config.json`, which `refuse` accepts.
  """
  if config.get('use_dora'):
    return 'use_dora is set: DoRA also scales what is there'
  if config.get('bias') not in (None, 'none'):
    return f'bias is {config["bias"]!r}: biases of the base were trained too'
  start = str(config.get('init_lora_weights')).lower()
  if start in ('pissa', 'olora') or config.get('kasa_config'):
    return f'init_lora_weights is {start!r}: the base was changed by it'
  return None


_CONVERT = (
  'Where it was trained, save it with `path_initial_model_for_weight_'
  'conversion`, which makes a plain LoRA of it, or merge it there'
)


def weight(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + s B A`, with DoRA `m (W + s B A) / |W + s B A|` by output.

  `s = alpha / r`, or `alpha / sqrt(r)` with `use_rslora`. Where training
  began with parts of `W` itself (PiSSA, OLoRA, KaSA), those are taken out
  first, as PEFT does on loading.

  Args:
    kernel: <float32>[outputs, inputs, ...], of a convolution too; an embedding
      is `[width, tokens]`.
    layer: `lora_A` [r, inputs, ...], `lora_B` [outputs, r]; `lora_diag` [r];
      `lora_magnitude_vector` [outputs].

  Source: Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685; Liu et al.,
  DoRA, 2024, https://arxiv.org/abs/2402.09353, eq. 5; Meng et al., PiSSA, 2024,
  https://arxiv.org/abs/2404.02948; Buyukakyuz, OLoRA, 2024,
  https://arxiv.org/abs/2406.01775; Wang et al., KaSA, 2024,
  https://arxiv.org/abs/2412.06071.
  """
  a = layer.part('lora_A', 'lora_embedding_A')
  b = layer.part('lora_B', 'lora_embedding_B')
  rank = a.shape[0]
  if 'lora_diag' in layer.parts:
    b = b * layer.parts['lora_diag']
  delta = b.reshape(-1, rank) @ a.reshape(rank, -1)
  rest = _rest(kernel.reshape(len(kernel), -1), layer, rank)
  total = rest + scale(layer, rank) * delta
  if 'lora_magnitude_vector' in layer.parts:
    size = layer.parts['lora_magnitude_vector'].reshape(-1, 1)
    total = size / np.linalg.norm(total, axis=1, keepdims=True) * total
  return total.reshape(kernel.shape)


def bias(vector: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`b + s c`, where `lora_bias` gave `B` a bias `c`; `b` otherwise."""
  if 'lora_B.bias' not in layer.parts:
    return vector
  rank = layer.parts['lora_A'].shape[0]
  return vector + scale(layer, rank) * layer.parts['lora_B.bias']


def adalora(kernel: np.ndarray, layer: base.Layer) -> np.ndarray:
  """`W + alpha / (r + 1e-5) B diag(E) A`; the small number is PEFT's.

  Source: Zhang et al., AdaLoRA, 2023, https://arxiv.org/abs/2303.10512.
  """
  a, b = layer.parts['lora_A'], layer.parts['lora_B']
  # Pruned ranks are not saved, but training goes on dividing by the first one.
  rank = float(layer.config.get('init_r') or a.shape[0])
  alpha = layer.setting('lora_alpha', 'alpha_pattern', 8)
  by = np.float32((alpha if alpha > 0 else rank) / (rank + 1e-5))
  delta = b @ (a * layer.parts['lora_E'].reshape(-1, 1))
  return kernel + by * delta.reshape(kernel.shape)


def scale(layer: base.Layer, rank: int) -> np.float32:
  """`s` of a layer.

  Raises:
    CheckpointError: the configuration has another rank than the factors.
  """
  told = layer.setting('r', 'rank_pattern', rank)
  if told != rank:
    raise errors.CheckpointError(
      f'{layer.module} has factors of rank {rank}, but by adapter_config.json r '
      f'is {told:g} there, and with it the scale would be another: the two files '
      'are not of one adapter.'
    )
  alpha = layer.setting('lora_alpha', 'alpha_pattern', 8)
  root = math.sqrt(rank) if layer.config.get('use_rslora') else rank
  return np.float32(alpha / root)


def _rest(kernel, layer, rank):
  """What is left of a kernel [outputs, n] once its adapter is taken out."""
  if 'lora_A' not in layer.parts:
    return kernel  # embeddings are never decomposed
  start = str(layer.config.get('init_lora_weights'))
  if start == 'pissa':
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    return kernel - (u[:, :rank] * s[:rank]) @ v[:rank]
  if start.lower() == 'olora':
    q, r = np.linalg.qr(kernel)
    return kernel - scale(layer, rank) * (q[:, :rank] @ r[:rank])
  if layer.config.get('kasa_config'):
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    return (u[:, :-rank] * s[:-rank]) @ v[:-rank]
  return kernel
