# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The best low-rank adapter for the difference of two models."""

from collections.abc import Callable
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import stored_transposed
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import numerics
from mergejax.core import tree
from mergejax.names import known

# Linear kernels by the names of Hugging Face decoders and encoders.
KERNELS = r'.*\.weight'
_HEADS = re.compile(r'(.*\.)?(lm_head|embed_out)\.weight')


class Residual(NamedTuple):
  """What an adapter misses of one kernel.

  Attributes:
    path: of the kernel.
    rank: of the adapter there.
    share: `|delta - B A| / |delta|`, Frobenius norms; 0 where nothing changed.
  """

  path: str
  rank: int
  share: float


def extract_lora(
  model: str | os.PathLike,
  base: str | os.PathLike,
  out: str | os.PathLike,
  *,
  rank: int,
  match: str = KERNELS,
  dtype: str = 'float32',
  progress: Callable[[Residual], None] | None = None,
) -> tuple[list[Residual], list[str]]:
  """Writes a LoRA adapter that turns `base` into almost `model`.

  For each kernel the truncated singular value decomposition of `model - base`:
  no other matrix of that rank is nearer. `B = U sqrt(S)`, `A = sqrt(S) V^T`,
  `lora_alpha = rank`, so that the adapter is added as it is.

  Args:
    model: a checkpoint with Hugging Face names.
    base: the checkpoint it was fine-tuned from.
    out: directory to create, in PEFT's format.
    rank: largest rank; kernels with a smaller side get that.
    match: regular expression of the kernels; by default all matrices but the
      head. Embedding tables are never among them.
    dtype: of the adapter.
    progress: called with each kernel's residual.

  Returns:
    The residuals of all kernels, and the paths of other parameters that differ
    and that the adapter therefore misses.

  Raises:
    UserError: differing architectures, nothing to extract, a rank below 1, a
      `match` that is no regular expression.
  """
  if rank < 1:
    raise errors.ConfigError(f'The rank must be 1 or more, not {rank}.')
  stores = [checkpoint.open_weights(path) for path in (base, model)]
  specs = stores[0].specs()
  tree.check_same(
    specs,
    stores[1].specs(),
    expected_name=stores[0].name,
    given_name=stores[1].name,
  )
  wanted = tree.expression(match, 'match')
  kernels = [
    path
    for path, spec in specs.items()
    if len(spec.shape) == 2
    and wanted.fullmatch(path)
    and not known.ADAPTED_TABLE.fullmatch(path)
    and (match != KERNELS or not _HEADS.fullmatch(path))
  ]
  if not kernels:
    raise errors.ConfigError(
      f'No matrix of {stores[0].name} matches {match!r}. `mergejax inspect` '
      "lists its parameters; adapters in PEFT's format are of kernels called "
      '`....weight`, and not of embedding tables.'
    )
  turned = bool(stored_transposed.find(specs))
  leaves, residuals, missed = {}, [], []
  kind = np.dtype({'bfloat16': ml_dtypes.bfloat16}.get(dtype, dtype))
  for path, spec in specs.items():
    if not numerics.is_averaged(spec.dtype):
      continue
    wide = [
      np.asarray(store.leaves([path])[path]).astype(np.float32)
      for store in stores
    ]
    delta = wide[1] - wide[0]
    if path not in kernels:
      missed += [path] if delta.any() else []
      continue
    module = path.removesuffix('.weight')
    if turned and stored_transposed.is_one(module):
      delta = delta.T  # PEFT's factors are of [outputs, inputs]
    a, b, share = factors(delta, rank, kind)
    leaves[f'base_model.model.{module}.lora_A.weight'] = a
    leaves[f'base_model.model.{module}.lora_B.weight'] = b
    residuals.append(Residual(path, len(a), share))
    if progress is not None:
      progress(residuals[-1])
  with files.atomic_path(pathlib.Path(out)) as temporary:
    temporary.mkdir()
    safetensors.write(temporary / 'adapter_model.safetensors', leaves)
    config = _config(stores[0], specs, rank, residuals) | {
      'base_model_name_or_path': str(base),
      'fan_in_fan_out': turned,
    }
    text = json.dumps(config, indent=2) + '\n'
    (temporary / 'adapter_config.json').write_text(text)
  return residuals, missed


def factors(
  delta: np.ndarray, rank: int | None, dtype: Any
) -> tuple[np.ndarray, np.ndarray, float]:
  """The nearest product of a rank, by singular values.

  Args:
    delta: `<float32>[outputs, inputs]`.
    rank: at most; None for as many as are more than rounding.
    dtype: of the factors.

  Returns:
    `A [rank, inputs]`, `B [outputs, rank]`, and the share of `delta` that `B A`
    misses, by Frobenius norms.
  """
  u, s, v = np.linalg.svd(delta, full_matrices=False)
  if rank is None:
    least = s[0] * max(delta.shape) * np.finfo(np.float32).eps
    rank = max(1, int(np.sum(s > least)))
  own = min(rank, len(s))
  root = np.sqrt(s[:own])
  b, a = (
    (u[:, :own] * root).astype(dtype),
    (root[:, None] * v[:own]).astype(dtype),
  )
  size = np.linalg.norm(delta)
  rest = delta - b.astype(np.float32) @ a.astype(np.float32)
  return a, b, float(np.linalg.norm(rest) / size) if size else 0.0


def _config(store, specs, rank, residuals):
  modules = [r.path.removesuffix('.weight') for r in residuals]
  smaller = {
    f'^{re.escape(module)}': r.rank
    for module, r in zip(modules, residuals, strict=True)
    if r.rank < rank
  }
  return {
    'peft_type': 'LORA',
    'task_type': _task(checkpoint.read_config(store.name)),
    'r': rank,
    'lora_alpha': rank,
    'lora_dropout': 0.0,
    'bias': 'none',
    'inference_mode': True,
    'target_modules': _targets(modules, specs),
    'rank_pattern': smaller,
    'alpha_pattern': smaller,
  }


def _task(config):
  """PEFT's name of what the model is for; None is a plain model."""
  for name in (config or {}).get('architectures') or ():
    if name.endswith(('ForCausalLM', 'LMHeadModel')):
      return 'CAUSAL_LM'
    if name.endswith('ForConditionalGeneration'):
      return 'SEQ_2_SEQ_LM'
  return None


def _targets(modules, specs):
  """Last names of the modules where they mean no other one, else full names.

  PEFT takes every module whose path is a target or ends with one: `0` of a
  sequence is also the first layer of a model.
  """
  every = set()
  for path in specs:
    parts = path.split('.')[:-1]
    every |= {'.'.join(parts[:end]) for end in range(1, len(parts) + 1)}
  others = {path.rpartition('.')[2] for path in every - set(modules)}
  targets = set()
  for module in modules:
    last = module.rpartition('.')[2]
    targets.add(module if last.isdigit() or last in others else last)
  return sorted(targets)
