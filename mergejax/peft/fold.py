# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format as models: folded into their base leaf by leaf."""

import math
import pathlib
import re
from typing import Any

import numpy as np

from mergejax import errors
from mergejax import typing
from mergejax.store import base
from mergejax.store import checkpoint
from mergejax.store import safetensors

CONFIG = 'adapter_config.json'
_PREFIX = 'base_model.model.'
_PARTS = re.compile(
  r'(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B'
  r'|ia3_l)(\.default)?(\.weight)?'
)


def is_adapter(path: str) -> bool:
  """True for a directory that holds an adapter rather than a model."""
  return (pathlib.Path(path).expanduser() / CONFIG).is_file()


class AdapterStore(base.ParamStore):
  """A base model with a LoRA or (IA)^3 adapter folded in.

  LoRA: `W + s B A` with `s = alpha / r`, or `alpha / sqrt(r)` with
  `use_rslora`. (IA)^3: `W` with its output rows, or for feed-forward modules
  its input columns, multiplied by the learned vector. Changed leaves are
  float32, so that small changes of bfloat16 weights are not rounded away
  before they are merged.
  """

  def __init__(self, model: base.ParamStore, path: str):
    """Opens an adapter.

    Args:
      model: the model it was trained on.
      path: a directory with `adapter_config.json` and
        `adapter_model.safetensors`.

    Raises:
      UserError: another kind of adapter, a module that the model does not
        have, shapes that do not fit.
    """
    folder = pathlib.Path(path).expanduser()
    self._model = model
    self._config = checkpoint.read_json(folder / CONFIG)
    weights = folder / 'adapter_model.safetensors'
    if not weights.is_file():
      raise errors.UserError(
        f'{folder} has {CONFIG} but no adapter_model.safetensors. A pickle '
        '(.bin) is never read: save the adapter with '
        '`model.save_pretrained(DIR, safe_serialization=True)`.'
      )
    self._adapter = safetensors.SafetensorsStore(weights)
    self.provenance = {'format': 'adapter', 'path': f'{model.name}+{path}'}
    self.tied = model.tied
    kind = str(self._config.get('peft_type', '')).upper()
    if kind not in ('LORA', 'IA3'):
      raise errors.UserError(
        f'{folder} is a {kind or "nameless"} adapter; LORA and IA3 can be '
        'folded into a model.'
      )
    self._parts: dict[typing.Path, dict[str, typing.Path]] = {}
    self._specs = dict(model.specs())
    for name in self._adapter.specs():
      match = _PARTS.fullmatch(name.removeprefix(_PREFIX))
      leaf = f'{match["module"]}.weight' if match else None
      if leaf not in self._specs:
        raise errors.UserError(
          f'{folder}: {name} belongs to no parameter of {model.name}'
          + (f' (looked for {leaf})' if leaf else '')
          + '. Is this the model that the adapter was trained on?'
        )
      part = match['part'].replace('embedding_', '')
      self._parts.setdefault(leaf, {})[part] = name
    for leaf, parts in self._parts.items():
      self._check(folder, leaf, parts)
      shape = self._specs[leaf].shape
      self._specs[leaf] = typing.LeafSpec(shape, np.dtype(np.float32))

  def _check(self, folder, leaf, parts):
    shape = self._specs[leaf].shape
    specs = {
      part: self._adapter.specs()[name].shape for part, name in parts.items()
    }
    if set(parts) == {'ia3_l'}:
      fits = math.prod(specs['ia3_l']) in shape
    elif set(parts) == {'lora_A', 'lora_B'}:
      a, b = specs['lora_A'], specs['lora_B']
      fits = len(a) == len(b) == len(shape) == 2 and (
        (b[0], a[1]) == shape and a[0] == b[1]
      )
    else:
      raise errors.UserError(
        f'{folder}: {leaf} has {sorted(parts)}; a LoRA kernel needs lora_A '
        'and lora_B.'
      )
    if not fits:
      raise errors.UserError(
        f'{folder}: {leaf} is {list(shape)} in {self._model.name}, which '
        f'{ {p: list(s) for p, s in specs.items()} } does not fit.'
      )

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self):
    own = pathlib.Path(self._adapter.provenance['path']).with_name(CONFIG)
    return [*self._model.files(), *self._adapter.files(), own]

  def leaves(self, paths):
    leaves = dict(self._model.leaves(paths))
    for path in paths:
      if path in self._parts:
        wide = np.asarray(leaves[path]).astype(np.float32)
        leaves[path] = self._fold(path, wide)
    return leaves

  def _fold(self, path, leaf):
    parts = {
      part: np.asarray(self._adapter.leaves([name])[name]).astype(np.float32)
      for part, name in self._parts[path].items()
    }
    if 'ia3_l' in parts:
      module = path.removesuffix('.weight')
      inputs = _matches(self._config.get('feedforward_modules'), module)
      vector = parts['ia3_l'].reshape(-1)
      return leaf * (vector[None, :] if inputs else vector[:, None])
    a, b = parts['lora_A'], parts['lora_B']
    rank = a.shape[0]
    alpha = float(_of_module(self._config, 'lora_alpha', path, rank))
    root = math.sqrt(rank) if self._config.get('use_rslora') else rank
    delta = b @ a
    if self._config.get('fan_in_fan_out'):
      delta = delta.T
    return leaf + np.float32(alpha / root) * delta


def _matches(names: Any, module: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(
    module == name or module.endswith('.' + name) for name in names or ()
  )


def _of_module(config, key, path, default):
  """A setting, or its exception for a module (`alpha_pattern`)."""
  module = path.removesuffix('.weight')
  for pattern, value in (config.get('alpha_pattern') or {}).items():
    if re.fullmatch(rf'(.*\.)?({pattern})', module):
      return value
  return config.get(key, default)
