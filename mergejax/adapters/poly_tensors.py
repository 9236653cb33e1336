# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Inventories of skills as tensors of PEFT's Poly, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergejax import models
from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import routes
from mergejax.adapters import tensors
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

# Our names of the leaves of an inventory, and PEFT's.
_POLY = {
  routes.A: 'poly_lora_A',
  routes.B: 'poly_lora_B',
  routes.LOGITS: 'poly_router.module_logits',
}


def as_peft(adapter: routes.Poly) -> bool:
  """Whether PEFT's Poly computes what an inventory does."""
  plain = routes.poly(tasks=1)
  same = ('alpha', 'selector', 'shared_skill', 'mix', 'selectors')
  return all(getattr(adapter, n) == getattr(plain, n) for n in same)


def of_poly(
  family: adapted_lib.Adapted, adapter: routes.Poly, own: typing.Tree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """`(tensors, adapter_config.json)` of an inventory that is `as_peft`."""
  axes = {path: spec.axes for path, spec in family.adapter_specs.items()}
  modules = tensors.by_module(family, dict(tree.flatten(own)), axes)
  found = {
    f'{tensors.PREFIX}{module}.{_POLY[name]}': leaf
    for module, parts in modules.items()
    for name, leaf in parts.items()
  }
  return found, {
    'peft_type': 'POLY',
    **tensors.config_of(family, modules),
    'poly_type': 'poly',
    'r': adapter.rank,
    'n_tasks': adapter.tasks,
    'n_skills': adapter.skills,
    'n_splits': adapter.heads,
  }


def to_poly(
  family: models.ModelFamily, config: Mapping[str, Any], given: tensors.Tensors
) -> tuple[routes.Poly, dict[typing.Path, Any]]:
  """`(adapter, leaves)` of a file; see `tensors.to_lora`.

  PEFT draws relaxed gates whenever it trains, and so does the adapter.
  """
  if config.get('poly_type', 'poly') != 'poly':
    raise errors.CheckpointError(
      f"poly_type is {config['poly_type']!r}, and only 'poly' is known."
    )
  apart = tensors.one_by_one(family)
  paths = {
    module: path
    for path, module in tensors.modules_of(apart, apart.specs()).items()
  }
  ours = {theirs: name for name, theirs in _POLY.items()}
  leaves: dict[str, dict[str, np.ndarray]] = {}
  for name, leaf in given.items():
    module = tensors.module_of(name)
    part = name.removeprefix(tensors.PREFIX).removeprefix(f'{module}.')
    if part not in ours:
      raise errors.CheckpointError(
        f'It also has {name}, which is no part of an inventory of skills.'
      )
    if module not in paths:
      raise errors.StructureError(
        errors.near(module, paths, 'module of the base')
      )
    folder = paths[module].rpartition('/')[0]
    leaves.setdefault(folder, {})[ours[part]] = leaf
  for folder, parts in leaves.items():
    if len(parts) < len(ours):
      raise errors.CheckpointError(
        f'{folder} has {errors.some(sorted(parts))} alone: tensors are missing.'
      )
  own = tensors.arranged(family, leaves, tuple(_POLY))
  adapter = routes.poly(
    tasks=config['n_tasks'], skills=config['n_skills'],
    heads=config['n_splits'], rank=config['r'], noise=True, start='peft',
    targets=tensors.targets_of(family, own),
  )  # fmt: skip
  specs = adapter.specs(family.specs())
  for path, leaf in own.items():
    if specs[path].shape != leaf.shape:
      raise errors.StructureError(
        f'{path} would be {list(specs[path].shape)} by the configuration and the '
        f'model, and {list(leaf.shape)} is in the file: the adapter is of another '
        'model.'
      )
  return adapter, own
