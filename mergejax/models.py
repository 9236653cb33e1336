# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: from a configuration, from a checkpoint, and back."""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import errors
from mergejax import tree
from mergejax import typing
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.store import base
from mergejax.store import checkpoint
from mergejax.store.names import t5 as t5_names

# model_type -> (module, config class, number of token arguments)
_KINDS = {
  't5x': (t5.Transformer, t5.T5Config, 3),
  'lm': (lm.LanguageModel, lm.LMConfig, 2),
}


def build(config: Mapping[str, Any]) -> nn.Module:
  """Builds the module that a `config.json` of this project describes.

  Args:
    config: `model_type` (`'t5x'` or `'lm'`) and the fields of `T5Config` or
      `LMConfig`; missing fields take their defaults.

  Raises:
    UserError: unknown `model_type` or field (near names are offered).

  Example:
    >>> build({'model_type': 'lm', 'emb_dim': 8}).config.emb_dim
    8
  """
  fields = dict(config)
  kind = fields.pop('model_type', None)
  if kind not in _KINDS:
    raise errors.UserError(errors.near(str(kind), _KINDS, 'model_type'))
  module, config_class, _ = _KINDS[kind]
  known = [field.name for field in dataclasses.fields(config_class)]
  for name, value in fields.items():
    if name not in known:
      raise errors.UserError(
        errors.near(name, known, f'setting of a {kind} model,')
      )
    if isinstance(value, list):
      fields[name] = tuple(value)
  return module(config_class(**fields))


def describe(module: nn.Module) -> dict[str, Any]:
  """The `config.json` from which `build` makes `module` again."""
  for kind, (module_class, _, _) in _KINDS.items():
    if isinstance(module, module_class):
      return {'model_type': kind, **dataclasses.asdict(module.config)}
  raise errors.UserError(
    f'{type(module).__name__} cannot be described by a config.json; known '
    f'model types: {", ".join(_KINDS)}.'
  )


def _tokens(module: nn.Module) -> list[typing.Array]:
  count = next(n for cls, _, n in _KINDS.values() if isinstance(module, cls))
  return [jnp.ones((1, 1), jnp.int32)] * count


def init_params(module: nn.Module, key: jax.Array) -> typing.Tree:
  """Fresh float32 parameters of a model."""
  return module.init(key, *_tokens(module))['params']


def param_specs(module: nn.Module) -> typing.SpecTree:
  """`{path: LeafSpec}` of a model, without making its parameters."""
  return tree.specs(
    jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
  )


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
  store = checkpoint.open_checkpoint(path)
  config = checkpoint.read_config(path)
  if config is None:
    raise errors.UserError(
      f'{path} has no {checkpoint.CONFIG}, so its architecture is unknown. '
      'Add one: {"model_type": "lm" or "t5x", ...sizes}. `mergejax inspect` '
      'lists the shapes.'
    )
  if config.get('model_type') == 't5':
    config = dict(model_type='t5x', **t5_names.config_from_hf(config))
    leaves = tree.flatten(store.read())
    leaves = t5_names.from_hf(leaves, tied_head=config['logits_via_embedding'])
    store = base.MemoryStore(leaves, name=str(path))
  params = store.read(sharding=sharding)
  module = build(config)
  tree.check_same(
    param_specs(module),
    tree.specs(params),
    expected_name=f'the model that {checkpoint.CONFIG} describes',
    given_name=str(path),
  )
  return module, params
