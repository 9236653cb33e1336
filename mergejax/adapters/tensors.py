# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Leaves of adapters as tensors of PEFT's files, and back."""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import re
from typing import Any

import jax
import numpy as np

from mergejax import models
from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import low_rank
from mergejax.adapters import prompts
from mergejax.adapters import scales
from mergejax.adapters import sites as sites_lib
from mergejax.checkpoints import fingerprints
from mergejax.checkpoints.peft import base as peft_base
from mergejax.checkpoints.peft import kinds
from mergejax.checkpoints.peft import lora as peft_lora
from mergejax.checkpoints.peft import names as peft_names
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

PREFIX = 'base_model.model.'
_SCALE = 'lora_scale'
# Whether inputs are scaled; travels with the leaves of its layer.
_BY_INPUTS = 'ia3_by_inputs'
_NOT_ALIKE = (
  'The layers of the model are scanned, and those of the adapter are not alike: '
  'scanned layers have one rank, scale the same side, and all of them are '
  'adapted. Build the model with scan_layers=False.'
)
Tensors = Mapping[str, np.ndarray]
# A number of a layer, which lies in a scanned stack as its leaves do.
_ONE = sites_lib.Part((1, 1), ('one', 'one'), jax.random.normal)


def one_by_one(family: models.ModelFamily) -> models.ModelFamily:
  """The family with its layers one by one, as files have them."""
  config = family.config
  if not getattr(config, 'scan_layers', False):
    return family
  config = dataclasses.replace(config, scan_layers=False)
  return type(family)(type(family.module)(config))


def fingerprint(family: models.ModelFamily, params: typing.Tree) -> str:
  """Of a base's numbers, the same whether its layers are scanned or not."""
  specs = family.specs()
  axes = {path: s.axes for path, s in specs.items() if s.axes is not None}
  apart = one_by_one(family).arranged(tree.flatten(params), axes)
  return fingerprints.fingerprint(tree.unflatten(apart))


def modules_of(
  apart: models.ModelFamily, base: typing.SpecTree
) -> dict[str, str]:
  """`{path of a kernel: what the module is called at Hugging Face}`.

  By its own path, with dots, where it has no name there.
  """
  conversion = next(iter(apart.conversions.values()), None)
  found = {}
  for path, spec in base.items():
    if len(spec.shape) < 2 or path.endswith('embedding'):
      continue
    name = path.replace('/', '.').removesuffix('.kernel')
    if conversion is not None:
      ones = np.ones((1,) * len(spec.shape), np.float32)
      # A sparse model has kernels, of its experts, without a name there.
      with contextlib.suppress(errors.UserError):
        (name,) = conversion.write({path: ones})
    found[path] = name.removesuffix('.weight')
  return found


def module_of(name: str) -> str:
  """The module that a tensor of a file belongs to.

  Example:
    >>> module_of('base_model.model.encoder.q.lora_A.weight')
    'encoder.q'
  """
  parts = r'\.(lora_[AB]|ia3_l|poly_lora_[AB]|poly_router)\b.*'
  return re.sub(parts, '', name).removeprefix(PREFIX)


def of_lora(
  family: adapted_lib.Adapted, adapter: low_rank.Lora, own: typing.Tree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """`(tensors, adapter_config.json)` of a LoRA."""
  leaves, axes = dict(tree.flatten(own)), {}
  for path, spec in family.adapter_specs.items():
    axes[path] = spec.axes
  for site in adapter.sites(family.base_specs):
    spec = site.stacked(_ONE)
    leaf = site.leaf(_SCALE)
    scale = np.float32(adapter.scale_at(site.path))
    leaves[leaf], axes[leaf] = np.full(spec.shape, scale), spec.axes
  found, factors = {}, {}
  for module, parts in by_module(family, leaves, axes).items():
    a, b = parts['lora_a'], parts['lora_b']
    rank = b.shape[0]
    found[f'{PREFIX}{module}.lora_A.weight'] = a.reshape(-1, rank).T
    found[f'{PREFIX}{module}.lora_B.weight'] = b.reshape(rank, -1).T
    root = np.sqrt(rank) if adapter.rank_stabilised else rank
    factors[module] = rank, float(parts[_SCALE].reshape(()) * root)
  rank, alpha = next(iter(factors.values()))
  other = {m: each for m, each in factors.items() if each != (rank, alpha)}
  exact = lambda module: f'^{re.escape(module)}'
  return found, {
    'peft_type': 'LORA',
    **config_of(family, factors),
    'r': rank,
    'lora_alpha': alpha,
    'lora_dropout': adapter.dropout,
    'use_rslora': adapter.rank_stabilised,
    'bias': 'none',
    'fan_in_fan_out': False,
    'rank_pattern': {exact(m): each[0] for m, each in other.items()},
    'alpha_pattern': {exact(m): each[1] for m, each in other.items()},
  }


def of_ia3(
  family: adapted_lib.Adapted, adapter: scales.Ia3, own: typing.Tree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """`(tensors, adapter_config.json)` of (IA)^3."""
  axes = {path: spec.axes for path, spec in family.adapter_specs.items()}
  leaves = dict(tree.flatten(own))
  for site in adapter.sites(family.base_specs):
    if adapter.place_at(site.path) == 'inputs':
      spec = site.stacked(_ONE)
      leaves[site.leaf(_BY_INPUTS)] = np.ones(spec.shape, np.float32)
      axes[site.leaf(_BY_INPUTS)] = spec.axes
  found, inputs = {}, []
  modules = by_module(family, leaves, axes)
  for module, parts in modules.items():
    scale = parts[scales.SCALE].reshape(-1)
    by_inputs = _BY_INPUTS in parts
    inputs += [module] if by_inputs else []
    shape = (1, -1) if by_inputs else (-1, 1)
    found[f'{PREFIX}{module}.ia3_l'] = scale.reshape(shape)
  return found, {
    'peft_type': 'IA3',
    **config_of(family, modules),
    'feedforward_modules': sorted(inputs),
    'fan_in_fan_out': False,
  }


def of_prompt(
  family: adapted_lib.Adapted, adapter: prompts.Prompt, own: typing.Tree
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """`(tensors, adapter_config.json)` of a prompt."""
  config = config_of(family, {})
  del config['target_modules']
  target = np.asarray(tree.flatten(own)[prompts.TARGET], np.float32)
  return {'prompt_embeddings': target}, {
    'peft_type': 'PROMPT_TUNING',
    **config,
    'num_virtual_tokens': adapter.length,
    'token_dim': target.shape[1],
    # The encoder alone reads it.
    'num_transformer_submodules': 1,
    'prompt_tuning_init': 'RANDOM',
  }


def config_of(
  family: adapted_lib.Adapted, modules: Iterable[str]
) -> dict[str, Any]:
  """What every `adapter_config.json` says of the base and of its modules."""
  task = None  # of PEFT's plain models, which are no language models
  if family.decodes:
    task = 'SEQ_2_SEQ_LM' if family.answers else 'CAUSAL_LM'
  return {
    'task_type': task,
    'inference_mode': True,
    'target_modules': sorted(modules),
  }


def by_module(
  family: adapted_lib.Adapted,
  leaves: Mapping[typing.Path, Any],
  axes: Mapping[typing.Path, Any],
) -> dict[str, dict[str, np.ndarray]]:
  """`{module: {own name: array}}`, layers one by one, by names of files."""
  apart = one_by_one(family.plain)
  leaves = {p: np.asarray(x, np.float32) for p, x in leaves.items()}
  found: dict[str, dict[str, np.ndarray]] = {}
  modules = modules_of(apart, apart.specs())
  of_folder = {p.rpartition('/')[0]: module for p, module in modules.items()}
  for path, leaf in apart.arranged(leaves, axes).items():
    folder, _, name = path.rpartition('/')
    found.setdefault(of_folder[folder], {})[name] = np.asarray(leaf)
  return found


def to_lora(
  family: models.ModelFamily, config: Mapping[str, Any], given: Tensors
) -> tuple[low_rank.Lora, dict[typing.Path, Any]]:
  """`(adapter, leaves)` of a file.

  Raises:
    CheckpointError: DoRA, trained biases or whole modules, ...: what is no LoRA
      alone.
    StructureError: modules that the model has not.
  """
  reason = peft_lora.refuse(config) or peft_lora.beyond_products(config)
  if reason is not None:
    raise errors.CheckpointError(f'{reason}. {_FOLD}')
  leaves, factors = {}, {}
  for folder, parts, layer in _layers(family, config, given, 'LORA'):
    if set(parts) != {'lora_A', 'lora_B'}:
      raise errors.CheckpointError(
        f'{layer.module} has {", ".join(sorted(parts))}, which is more than a '
        f'LoRA of a kernel. {_FOLD}'
      )
    a, b = parts['lora_A'], parts['lora_B']
    scale = peft_lora.scale(layer, len(a))
    factors[folder] = len(a), layer.setting('lora_alpha', 'alpha_pattern', 8)
    leaves[folder] = {'lora_a': a.T, 'lora_b': b.T, _SCALE: scale}
  one = len({*factors.values()}) == 1
  alpha, stabilised = None, False
  if one:
    ((rank, alpha),) = {*factors.values()}
    stabilised = bool(config.get('use_rslora'))
  else:
    # One alpha is not enough for these: scales go into B.
    rank = None
    for parts in leaves.values():
      parts['lora_b'] = parts['lora_b'] * parts[_SCALE]
  names = ('lora_a', 'lora_b')
  own = arranged(family, leaves, names)
  targets = targets_of(family, own)
  ranks = {
    f'{re.escape(folder)}/kernel': own[f'{folder}/lora_a'].shape[-1]
    for folder in {path.rpartition('/')[0] for path in own}
  }
  adapter = low_rank.lora(
    rank=rank if one and rank is not None else sorted(ranks.items()),
    alpha=alpha,
    rank_stabilised=stabilised,
    targets=targets,
    dropout=float(config.get('lora_dropout') or 0.0),
  )
  return adapter, own


def to_ia3(
  family: models.ModelFamily, config: Mapping[str, Any], given: Tensors
) -> tuple[scales.Ia3, dict[typing.Path, Any]]:
  """`(adapter, leaves)` of a file; see `to_lora`."""
  leaves = {}
  for folder, parts, _ in _layers(family, config, given, 'IA3'):
    vector = parts['ia3_l']
    leaves[folder] = {
      scales.SCALE: vector.reshape(-1),
      _BY_INPUTS: np.full(1, vector.shape[0] == 1),
    }
  own = arranged(family, leaves, (scales.SCALE, _BY_INPUTS))
  sides = {path: own.pop(path) for path in [*own] if path.endswith(_BY_INPUTS)}
  rules, specs = [], family.specs()
  for path, leaf in own.items():
    folder = path.rpartition('/')[0]
    by_inputs = sides[f'{folder}/{_BY_INPUTS}']
    if by_inputs.any() != by_inputs.all():
      raise errors.StructureError(_NOT_ALIKE)
    place = 'inputs' if by_inputs.all() else 'outputs'
    spec = specs[f'{folder}/kernel']
    (site,) = sites_lib.find({f'{folder}/kernel': spec}, ['.*'])
    shape, names = getattr(site, place)
    part = sites_lib.Part(shape, names, _ONE.init)
    if site.stacked(part).shape != leaf.shape:
      raise errors.StructureError(
        f'{folder} has a kernel {list(spec.shape)}, whose {place} a scale of '
        f'{list(leaf.shape)} does not fit: it is of another model.'
      )
    rules.append((f'{re.escape(folder)}/kernel', place))
  return scales.ia3(rules=rules), own


def to_prompt(
  family: models.ModelFamily, config: Mapping[str, Any], given: Tensors
) -> tuple[prompts.Prompt, dict[typing.Path, Any]]:
  """`(adapter, leaves)` of a file; see `to_lora`."""
  del family
  if config.get('num_transformer_submodules') not in (None, 1):
    raise errors.CheckpointError(
      'num_transformer_submodules is 2: PEFT puts a second prompt before the '
      'decoder, which is not done here. Train it with 1.'
    )
  if set(given) != {'prompt_embeddings'}:
    raise errors.CheckpointError(
      f'The file holds {errors.some(sorted(given))} instead of '
      'prompt_embeddings alone: it is no plain prompt.'
    )
  vectors = given['prompt_embeddings']
  return prompts.prompt(length=len(vectors)), {prompts.TARGET: vectors}


_FOLD = (
  'Fold it into its base, by a merge of BASE+ADAPTER (passthrough), and use the '
  'result'
)


def _layers(family, config, given, kind):
  """`(folder, tensors, layer)` of every module of a file, one by one."""
  names = peft_names.read(given, kinds.KINDS[kind])
  more = [*names.saved, *names.tokens]
  if more:
    raise errors.CheckpointError(
      f'It also has parameters that were trained whole ({errors.some(more)}). '
      f'{_FOLD}.'
    )
  apart = one_by_one(family)
  base = apart.specs()
  modules = {module: path for path, module in modules_of(apart, base).items()}
  for (module, _), paths in names.layers.items():
    if module not in modules:
      raise errors.StructureError(
        errors.near(module, modules, 'module of the base')
      )
    path = modules[module]
    parts = {name: given[file] for name, file in paths.items()}
    (site,) = sites_lib.find({path: base[path]}, [re.escape(path)])
    sizes = int(np.prod(site.outputs[0])), int(np.prod(site.inputs[0]))
    kernel = sizes[0], sizes[1]
    shapes = {name: x.shape for name, x in parts.items()}
    if kind == 'LORA' and not peft_base.fits(
      kernel, kinds.KINDS[kind].shapes, shapes
    ):
      raise errors.StructureError(
        f'{module} has a kernel of {kernel[1]} inputs and {kernel[0]} outputs, '
        f'which tensors of {list(shapes.values())} do not fit: the adapter is of '
        'another model.'
      )
    layer = peft_base.Layer(module, parts, {}, config)
    yield path.rpartition('/')[0], parts, layer


def arranged(
  family: models.ModelFamily,
  leaves: Mapping[str, Mapping[str, Any]],
  names: tuple[str, ...],
) -> dict[typing.Path, Any]:
  """Leaves of layers one by one as the model's own are, scanned or not."""
  flat = {
    f'{folder}/{name}'.lstrip('/'): parts[name]
    for folder, parts in leaves.items()
    for name in names
  }
  try:
    return family.arranged(flat)
  except ValueError as error:
    if isinstance(error, errors.UserError):
      raise
    raise errors.StructureError(_NOT_ALIKE) from error


def targets_of(
  family: models.ModelFamily, own: Mapping[typing.Path, Any]
) -> tuple[str, ...]:
  """A target for every module that leaves belong to."""
  del family
  folders = {path.rpartition('/')[0]: None for path in own}
  return tuple(f'{re.escape(folder)}/kernel' for folder in folders)
