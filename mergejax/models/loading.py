# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models from checkpoints: the `config.json` beside the weights tells which."""

import os
from typing import Any

import flax.linen as nn

from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import registry


def load_module(path: os.PathLike | str) -> nn.Module:
  """The module that a checkpoint's `config.json` describes; reads no weight.

  Raises:
    UserError: no `config.json`, or an unknown model type or setting.
  """
  config = checkpoint.read_config(path)
  if config is None:
    raise errors.ConfigError(
      f'{path} has no {checkpoint.CONFIG}, so its architecture is unknown. '
      'Add one: {"model_type": "lm" or "t5x", ...sizes}. `mergejax inspect` '
      'lists the shapes.'
    )
  found = registry.conversion(config)
  if found is not None:
    family, other = found
    config = dict(model_type=family.model_type, **other.read_config(config))
  return registry.build(config)


def is_converted(path: os.PathLike | str) -> bool:
  """Whether `load_model` gives a checkpoint's parameters other names.

  So it is with another library's: kernels lie transposed there, and statistics,
  adapters and searches by layer go by the names that are stored.
  """
  config = checkpoint.read_config(path)
  return config is not None and registry.conversion(config) is not None


def axes(path: os.PathLike | str) -> dict[typing.Path, tuple[str, ...]]:
  """`{path: logical axes}` of the parameters that `load_model` gives.

  Those that the checkpoint knows; of a converted one, those of the family.
  """
  if not is_converted(path):
    return checkpoint.open_checkpoint(path).axes()
  specs = registry.family_of(load_module(path)).specs()
  found = {name: spec.axes for name, spec in specs.items()}
  return {name: names for name, names in found.items() if names is not None}


def load_model(
  path: os.PathLike | str, sharding: Any = None
) -> tuple[nn.Module, typing.Tree]:
  """Loads a model: its linen module and its parameters.

  Args:
    path: a checkpoint directory with a `config.json`: one of ours (saved with
      `save_checkpoint(..., config=...)`) or a Hugging Face T5.
    sharding: see `ParamStore.read`.

  Returns:
    `(module, params)`; call `module.apply({'params': params}, ...)`, for T5
    with the signature of T5X's `Transformer`.

  Raises:
    UserError: no `config.json`, an unknown model type, or weights that are not
      those of the described model.
  """
  store = checkpoint.open_weights(path)
  module = load_module(path)
  config = checkpoint.read_config(path)
  found = registry.conversion(config)
  if found is not None:
    leaves = found[1].read(tree.flatten(store.read()), config)
    store = store_base.MemoryStore(leaves, name=str(path))
  params = store.read(sharding=sharding)
  tree.check_same(
    registry.family_of(module).specs(),
    tree.specs(params),
    expected_name=f'the model that {checkpoint.CONFIG} describes',
    given_name=str(path),
  )
  return module, params
