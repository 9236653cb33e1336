# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models from checkpoints: the `config.json` beside the weights tells which."""

from collections.abc import Callable, Sequence
import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from mergejax.checkpoints import assignment
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import base as models_base
from mergejax.models import fitting
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

  So it is with another library's, whose kernels lie transposed, and with layers
  that are stored one by one and stacked in the model (`scan_layers`), or the
  other way. Statistics, adapters and searches by layer go by the names that are
  stored.
  """
  config = checkpoint.read_config(path)
  if config is None:
    return False
  if registry.conversion(config) is not None:
    return True
  family = registry.family_of(load_module(path))
  return not family.in_form(checkpoint.open_checkpoint(path).specs())


def check_not_converted(path: os.PathLike | str) -> None:
  """Raises if `is_converted`.

  Raises:
    CheckpointError: with how to convert the checkpoint itself.
  """
  if not is_converted(path):
    return
  config = checkpoint.read_config(path) or {}
  found = registry.conversion(config)
  if found is not None:
    form = 'the names of Hugging Face, and its kernels lie transposed'
    option = f'--names {found[0].model_type}'
  else:
    form = f'its layers in another form than its {checkpoint.CONFIG} says'
    option = f'--scan_layers {"true" if config.get("scan_layers") else "false"}'
  raise errors.CheckpointError(
    f'{path} has {form}: statistics and searches by layer go by what is '
    'stored, so they would not match the model. Convert it first, and merge '
    f'what was converted: `mergejax convert {path} DST {option}`.'
  )


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
    with the signature of T5X's `Transformer`. Layers that are stored one by one
    are stacked where `config.json` says `scan_layers`, and the other way.

  Raises:
    UserError: no `config.json`, an unknown model type, or weights that are not
      those of the described model.
  """
  store = checkpoint.open_weights(path)
  family = registry.family_of(load_module(path))
  store = _in_form(_converted(path, store), family)
  params = store.read(sharding=sharding)
  _check_same(
    family.specs(),
    tree.specs(params),
    f'the model that {checkpoint.CONFIG} describes',
    str(path),
  )
  return family.module, params


def load_params(
  path: os.PathLike | str,
  model: nn.Module | models_base.ModelFamily,
  *,
  key: jax.Array | None = None,
  **how: Any,
) -> typing.Tree:
  """Loads parameters for a module that is there already.

  Args:
    path: a checkpoint of any format, with a `config.json` or without: of the
      same model, its layers stacked or one by one, or named as Hugging Face
      does.
    model: the module, or its family.
    key: of fresh parameters; `key(0)` by default.
    **how: `rules`, `fallback_to_scratch`, `pad_vocabulary`: see `fit_params`.

  Returns:
    The parameters in the dtypes of the module, whatever they are stored in, in
    host memory but for fresh ones.

  Raises:
    UserError: see `fit_params`.

  Example:
    >>> from mergejax import models
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> params = models.family_of(module).init(jax.random.key(0))
    >>> checkpoint.save_checkpoint('/tmp/doc.npz', params, overwrite=True)
    >>> sorted(load_params('/tmp/doc.npz', module)) == sorted(params)
    True
  """
  return fit_params(path, model, **how).read(key)


class Fit(NamedTuple):
  """Where a module's parameters come from.

  Attributes:
    read: `(key of fresh parameters, or None) -> parameters`.
    fresh: names of parameters that the checkpoint does not give.
    left: names in the checkpoint that the module does not take.
  """

  read: Callable[[jax.Array | None], typing.Tree]
  fresh: Sequence[typing.Path]
  left: Sequence[typing.Path]


def fit_params(
  path: os.PathLike | str,
  model: nn.Module | models_base.ModelFamily,
  *,
  rules: assignment.Rules | None = None,
  fallback_to_scratch: bool = False,
  pad_vocabulary: bool = False,
) -> Fit:
  """Finds where a module's parameters are in a checkpoint, to read them later.

  No weight is read of a checkpoint that has our names, and stacks its layers as
  the module does.

  Args:
    path: see `load_params`.
    model: likewise.
    rules: restore in part, `[(expression, stored name or None), ...]`, see
      `assignment.assign`; names are of parameters as the module has them, the
      layers of the checkpoint stacked likewise. What the checkpoint has beyond
      is left there.
    fallback_to_scratch: parameters that are not found are fresh.
    pad_vocabulary: tables of tokens may differ in the padding of the
      vocabulary to a multiple of 128, see `fitting.padded`.

  Returns:
    How to read them, and what is fresh or left there.

  Raises:
    UserError: the checkpoint is of another model (the differences are listed),
      or a rule does not fit; see `assignment.assign`.
  """
  family, name = registry.family_of(model), str(path)
  wanted = family.specs()
  store = _in_form(_converted(path, checkpoint.open_weights(path)), family)
  stored = store.specs()
  if rules is None and not fallback_to_scratch:
    sources = {path: path for path in stored}
  else:
    sources = assignment.assign(
      wanted, stored, rules or (),
      fallback_to_scratch=fallback_to_scratch, name=name,
    )  # fmt: skip
  taken = {new: old for new, old in sources.items() if old is not None}
  given = {new: stored[old] for new, old in taken.items()}
  padding = fitting.vocabulary_padding(wanted, given)
  if not pad_vocabulary:
    fitting.check_vocabulary(padding, wanted, given, name)
  fresh = [path for path in wanted if path in sources and path not in taken]
  _check_same(
    {path: spec for path, spec in wanted.items() if path not in fresh},
    {p: wanted[p] if p in padding else spec for p, spec in given.items()},
    'the configured module',
    name,
  )

  def read(key: jax.Array | None = None) -> typing.Tree:
    leaves = tree.flatten(store.read(dict.fromkeys(taken.values())))
    found = _fresh(family, fresh, key)
    for path, old in taken.items():
      leaf = leaves[old]
      if path in padding:
        axis = padding[path]
        leaf = fitting.padded(leaf, wanted[path].shape[axis], axis)
      found[path] = leaf.astype(wanted[path].dtype, copy=False)
    return tree.unflatten({path: found[path] for path in wanted})

  used = set(taken.values())
  return Fit(read, fresh, [path for path in stored if path not in used])


def _converted(path, store):
  """A store with our names: another library's checkpoint is read whole."""
  config = checkpoint.read_config(path)
  found = None if config is None else registry.conversion(config)
  if found is None:
    return store
  leaves = found[1].read(tree.flatten(store.read()), config)
  return store_base.MemoryStore(leaves, name=str(path))


def _in_form(store, family):
  """A store whose layers are stacked, or not, as the module's are."""
  if family.in_form(store.specs()):
    return store
  leaves = family.arranged(tree.flatten(store.read()), store.axes())
  return store_base.MemoryStore(leaves, name=store.name)


def _check_same(wanted, given, wanted_name, given_name):
  fitting.check_version(wanted, given, given_name)
  tree.check_same(
    wanted, given, expected_name=wanted_name, given_name=given_name
  )


def _fresh(family, paths, key):
  """`{path: leaf}` as the model would be initialised; others are not made."""
  if not paths:
    return {}

  def some(key):
    leaves = tree.flatten(family.init(key))
    return {path: leaves[path] for path in paths}

  return jax.jit(some)(jax.random.key(0) if key is None else key)
