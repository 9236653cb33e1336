# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models from checkpoints: the `config.json` beside the weights tells which."""

import os
from typing import Any

import flax.linen as nn

from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.names import t5 as t5_names
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
  if is_hugging_face(path):
    config = dict(model_type='t5x', **t5_names.config_from_hf(config))
  return registry.build(config)


def is_hugging_face(path: os.PathLike | str) -> bool:
  """Whether a checkpoint's parameters have Hugging Face's names for T5."""
  return (checkpoint.read_config(path) or {}).get('model_type') == 't5'


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
  if is_hugging_face(path):
    leaves = t5_names.from_hf(
      tree.flatten(store.read()),
      tied_head=module.config.logits_via_embedding,
    )
    store = store_base.MemoryStore(leaves, name=str(path))
  params = store.read(sharding=sharding)
  tree.check_same(
    registry.family_of(module).specs(),
    tree.specs(params),
    expected_name=f'the model that {checkpoint.CONFIG} describes',
    given_name=str(path),
  )
  return module, params
