# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The best low-rank adapter for the difference of two models."""

from collections.abc import Callable
import json
import os
import pathlib
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mergejax import errors
from mergejax import numerics
from mergejax import tree
from mergejax.store import base as store_base
from mergejax.store import checkpoint
from mergejax.store import safetensors

# Linear kernels by the names of Hugging Face decoders and encoders.
KERNELS = r'.*\.weight'
_TABLES = re.compile(r'(.*\.)?(\w*embed\w*|wte|wpe|shared|lm_head)\.weight')


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
    match: regular expression of the kernels; by default all matrices but
      embeddings and the head.
    dtype: of the adapter.
    progress: called with each kernel's residual.

  Returns:
    The residuals of all kernels, and the paths of other parameters that differ
    and that the adapter therefore misses.

  Raises:
    UserError: differing architectures, nothing to extract, a rank below 1.
  """
  if rank < 1:
    raise errors.UserError(f'The rank must be 1 or more, not {rank}.')
  stores = [checkpoint.open_weights(path) for path in (base, model)]
  specs = stores[0].specs()
  tree.check_same(
    specs,
    stores[1].specs(),
    expected_name=stores[0].name,
    given_name=stores[1].name,
  )
  kernels = [
    path
    for path, spec in specs.items()
    if len(spec.shape) == 2
    and re.fullmatch(match, path)
    and (match != KERNELS or not _TABLES.fullmatch(path))
  ]
  if not kernels:
    raise errors.UserError(
      f'No matrix of {stores[0].name} matches {match!r}. `mergejax inspect` '
      "lists its parameters; adapters in PEFT's format are of kernels called "
      '`....weight`.'
    )
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
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    own = min(rank, len(s))
    root = np.sqrt(s[:own])
    b, a = u[:, :own] * root, root[:, None] * v[:own]
    module = 'base_model.model.' + path.removesuffix('.weight')
    leaves[f'{module}.lora_A.weight'] = a.astype(kind)
    leaves[f'{module}.lora_B.weight'] = b.astype(kind)
    size = np.linalg.norm(delta)
    kept = a.astype(kind).astype(np.float32), b.astype(kind).astype(np.float32)
    share = float(np.linalg.norm(delta - kept[1] @ kept[0]) / size) if size else 0.0  # fmt: skip
    residuals.append(Residual(path, own, share))
    if progress is not None:
      progress(residuals[-1])
  with store_base.atomic_path(pathlib.Path(out)) as temporary:
    temporary.mkdir()
    safetensors.write(temporary / 'adapter_model.safetensors', leaves)
    text = json.dumps(_config(base, rank, kernels, residuals), indent=2)
    (temporary / 'adapter_config.json').write_text(text + '\n')
  return residuals, missed


def _config(base, rank, kernels, residuals):
  smaller = {r.path.removesuffix('.weight'): r.rank for r in residuals if r.rank < rank}  # fmt: skip
  return {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': str(base),
    'r': rank,
    'lora_alpha': rank,
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'target_modules': sorted({p.split('.')[-2] for p in kernels}),
    'rank_pattern': smaller,
    'alpha_pattern': smaller,
  }
