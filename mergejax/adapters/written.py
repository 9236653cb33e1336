# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merged changes as an adapter again: products become factors of some rank."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergejax.adapters import changes
from mergejax.checkpoints import base
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import extract
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing

_PREFIX = 'base_model.model.'
LARGEST, EXACT = 'largest', 'exact'


def write_changes(
  path: os.PathLike | str,
  merged: typing.Tree | base.ParamStore,
  like: Sequence[changes.ChangeStore],
  *,
  rank: int | str = LARGEST,
  dtype: Any = None,
  overwrite: bool = False,
) -> list[extract.Residual]:
  """Writes what a merge of adapters gave as one adapter, in PEFT's format.

  A product `s B A` gets the factors `B = U sqrt(S)`, `A = sqrt(S) V^T` of its
  truncated singular value decomposition, and `alpha = rank`: no other adapter of
  that rank is nearer.

  Args:
    path: a directory to create; all of it or nothing is there.
    merged: leaves as `ChangeStore` shows them, of `mj.merge` of such stores.
    like: the adapters that were merged. The first gives the configuration.
    rank: of LoRA: a number; 'largest', that of the adapters; 'exact', as much as
      a product has, which two adapters fill with the sum of their ranks, and
      methods that trim with more.
    dtype: of the tensors; by default that of the first adapter.
    overwrite: put it in the place of what is there.

  Returns:
    For each product the share that its factors miss; none of other kinds.

  Raises:
    ConfigError: a rank that is none.
    StructureError: leaves that are not those of the adapters.
    CheckpointError: the directory is there already.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = write_lora(folder / 'a', {'q.weight': np.eye(3)}, {}, rank=3)
    >>> one = changes.ChangeStore(folder / 'a')
    >>> found = write_changes(folder / 'b', one.read(), [one], rank=2)
    >>> round(found[0].share, 4), changes.ChangeStore(folder / 'b').ranks
    (0.5774, {'q': 2})

  Source: Eckart & Young, "The approximation of one matrix by another of lower
  rank" (1936), https://doi.org/10.1007/BF02288367.
  """
  store = merged
  if not isinstance(store, base.ParamStore):
    store = base.MemoryStore(merged)
  first = like[0]
  wanted = {path: spec for one in like for path, spec in one.specs().items()}
  shapes = lambda specs: {p: (*spec.shape,) for p, spec in specs.items()}
  if shapes(store.specs()) != shapes(wanted):
    lines = tree.difference(wanted, store.specs())
    raise errors.StructureError(
      'These leaves are not what the adapters change (- missing, + unexpected, '
      f'! shape or dtype):\n{errors.listed(lines)}'
    )
  marks = {one.base for one in like if one.base is not None}
  beside = {'base': marks.pop()} if len(marks) == 1 else {}
  kind = jnp.dtype(first.file_dtype if dtype is None else dtype)
  if first.space == changes.DELTA:
    return write_lora(
      path, store, first.config, rank=_rank(rank, like), dtype=kind,
      beside=beside, overwrite=overwrite,
    )  # fmt: skip
  leaves = {
    path: np.asarray(leaf).astype(kind)
    for path, leaf in store.leaves(list(store.specs())).items()
  }
  tensors, more = _vectors(first, leaves)
  _write(path, tensors, {**first.config, **more}, beside, overwrite)
  return []


def write_lora(
  path: os.PathLike | str,
  products: typing.Tree | base.ParamStore,
  config: Mapping[str, Any],
  *,
  rank: int | None,
  dtype: Any = np.float32,
  beside: Mapping[str, str] | None = None,
  overwrite: bool = False,
) -> list[extract.Residual]:
  """Writes products as a LoRA adapter; see `write_changes`.

  Args:
    path: a directory to create.
    products: `{MODULE.weight: [outputs, inputs]}`.
    config: settings to keep: the task, the name of the base.
    rank: at most; None for as much as each product has.
    dtype: of the factors.
    beside: what is known of the base.
    overwrite: put it in the place of what is there.
  """
  store = products
  if not isinstance(store, base.ParamStore):
    store = base.MemoryStore(products)
  tensors, residuals, ranks = {}, [], {}
  for name in store.specs():
    delta = np.asarray(store.leaves([name])[name]).astype(np.float32)
    a, b, share = extract.factors(delta, rank, np.dtype(dtype))
    module = name.removesuffix('.weight')
    tensors[f'{_PREFIX}{module}.lora_A.weight'] = a
    tensors[f'{_PREFIX}{module}.lora_B.weight'] = b
    residuals.append(extract.Residual(name, len(a), share))
    ranks[module] = len(a)
  most = max(ranks.values())
  other = {f'^{re.escape(m)}': r for m, r in ranks.items() if r != most}
  kept = {
    word: config[word]
    for word in ('task_type', 'base_model_name_or_path', 'fan_in_fan_out')
    if config.get(word) is not None
  }
  settings = {
    'peft_type': 'LORA', **kept, 'target_modules': sorted(ranks), 'r': most,
    'lora_alpha': most, 'lora_dropout': 0.0, 'bias': 'none',
    'inference_mode': True, 'rank_pattern': other, 'alpha_pattern': other,
  }  # fmt: skip
  _write(path, tensors, settings, beside or {}, overwrite)
  return residuals


def describe(residuals: Sequence[extract.Residual]) -> str:
  """What low ranks miss, in words."""
  worst = max(residuals, key=lambda one: one.share)
  mean = sum(one.share for one in residuals) / len(residuals)
  ranks = sorted({one.rank for one in residuals})
  span = f'{ranks[0]}' if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'
  return (
    f'rank {span}: misses {mean:.2%} of the merged changes in the mean, at most '
    f'{worst.share:.2%} ({worst.path})'
  )


def check_rank(rank: int | str) -> None:
  """Raises a `ConfigError` for a rank that is none."""
  if rank in (LARGEST, EXACT):
    return
  if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
    raise errors.ConfigError(
      f'rank must be a whole number of 1 or more, {LARGEST!r} (that of the '
      f'adapters) or {EXACT!r}, not {rank!r}.'
    )


def _rank(rank: int | str, like) -> int | None:
  check_rank(rank)
  if rank == LARGEST:
    return max(r for one in like for r in one.ranks.values())
  return None if isinstance(rank, str) else rank


def _vectors(first, leaves):
  """`(tensors, changed settings)` of what is merged leaf by leaf."""
  if first.kind == 'PROMPT_TUNING':
    return leaves, {}
  if first.kind == 'LORA':
    return {f'{_PREFIX}{path}.weight': x for path, x in leaves.items()}, {}
  modules = {path.removesuffix('.ia3_l'): x for path, x in leaves.items()}
  return {f'{_PREFIX}{path}': x for path, x in leaves.items()}, {
    'target_modules': sorted(modules),
    'feedforward_modules': sorted(
      module for module, x in modules.items() if x.shape[0] == 1
    ),
  }


def _write(path, tensors, config, beside, overwrite):
  with files.atomic_path(pathlib.Path(path), overwrite=overwrite) as temporary:
    temporary.mkdir()
    safetensors.write(temporary / fold.WEIGHTS, tensors)
    named = [(fold.CONFIG, config)]
    named += [(changes.BESIDE, beside)] if beside else []
    for name, content in named:
      (temporary / name).write_text(json.dumps(content, indent=2) + '\n')
