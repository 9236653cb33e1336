# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format as models: folded into their base leaf by leaf."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.checkpoints import ties
from mergejax.checkpoints.peft import base as base_lib
from mergejax.checkpoints.peft import experts
from mergejax.checkpoints.peft import kinds
from mergejax.checkpoints.peft import names as names_lib
from mergejax.checkpoints.peft import stored_transposed
from mergejax.core import errors
from mergejax.core import typing

CONFIG = 'adapter_config.json'
WEIGHTS = 'adapter_model.safetensors'
_MERGE = "Merge it with PEFT's `merge_and_unload()` and give the result instead"
# Heads that PEFT saves for these tasks without being told.
_HEADS = ('classifier', 'score', 'qa_outputs')

Edit = Callable[[np.ndarray], np.ndarray]


def is_adapter(path: str | os.PathLike) -> bool:
  """True for a directory that holds an adapter rather than a model.

  A model with adapter files left beside it is a model: where there is a
  `config.json`, transformers loads the weights that lie with it.
  """
  return _holds_adapter(path) and not _holds_model(path)


def check_model(model: Any) -> None:
  """Refuses the path of an adapter where a model is needed.

  The mean of the factors of two adapters is not a factor of their mean.

  Raises:
    UserError: `model` is the path of an adapter.
  """
  if isinstance(model, (str, os.PathLike)) and is_adapter(model):
    raise errors.CheckpointError(
      f'{model} is an adapter, not a model. A recipe folds it into what it was '
      f'trained on: `model: BASE+{model}`, for `mj.plan` or `mergejax merge`.'
    )


def left_beside(path: str) -> str | None:
  """A remark on the adapter files beside a model, None if there are none."""
  if not (_holds_adapter(path) and _holds_model(path)):
    return None
  return (
    f'{path} is a model with an adapter beside it, which is left out; '
    f'`model: {path}+{path}` would fold it in'
  )


def _holds_adapter(path):
  return (pathlib.Path(path).expanduser() / CONFIG).is_file()


def _holds_model(path):
  folder = pathlib.Path(path).expanduser()
  return (folder / checkpoint.CONFIG).is_file() and any(
    file.name != WEIGHTS for file in folder.glob('*.safetensors')
  )


class AdapterStore(base.ParamStore):
  """A base model with an adapter folded in, as PEFT merges it.

  `kinds.KINDS` lists what is folded, each with its formula. Changed leaves are
  float32, so that small changes of bfloat16 weights are not rounded away
  before they are merged.

  Attributes:
    config: changes to the model's `config.json` that the adapter brings.
    untied: heads that the model ties and the adapter made arrays of their own.
    remarks: what a reader of the plan should know.
  """

  def __init__(self, model: base.ParamStore, path: str):
    """Opens an adapter.

    Args:
      model: the model it was trained on.
      path: a directory with `adapter_config.json` and
        `adapter_model.safetensors`.

    Raises:
      UserError: a kind or setting that cannot be folded, a module that the
        model does not have, shapes that do not fit.
    """
    self._folder = pathlib.Path(path).expanduser()
    self._model = model
    if not _holds_adapter(path):
      raise errors.CheckpointError(
        f'{self._folder} is no adapter: it has no {CONFIG}. After `+` comes a '
        "directory in PEFT's format."
      )
    self._config = checkpoint.read_json(self._folder / CONFIG)
    self._kind = self._known_kind()
    self._adapter = self._weights()
    self.provenance = {'format': 'adapter', 'path': f'{model.name}+{path}'}
    self._tied = dict(model.tied)
    self.tied = self._tied
    self.config: dict[str, Any] = {}
    self.untied: set[typing.Path] = set()
    self.remarks: list[str] = []
    self._specs = dict(model.specs())
    self._saved: dict[typing.Path, typing.Path] = {}
    self._edits: dict[typing.Path, list[Edit]] = {}
    self._aliases: dict[typing.Path, typing.Path] = {}
    names = names_lib.read(self._adapter.specs(), self._kind)
    self._shared = {
      part: self._read(name) for part, name in names.shared.items()
    }
    # Experts that lie one by one share the tensors of their layer.
    self._parts = functools.lru_cache(maxsize=2)(self._read_parts)
    self._untie(names)
    for leaf, name in names.saved.items():
      self._save(leaf, name)
    self._fold_layers(names.layers)
    for module, name in names.tokens.items():
      self._fold_tokens(module, name)
    self._check_complete(names)
    for leaf in self._edits:
      self._specs[leaf] = dataclasses.replace(
        self._specs[leaf], dtype=np.dtype(np.float32)
      )

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self) -> list[pathlib.Path]:
    return [
      *self._model.files(), *self._adapter.files(), self._folder / CONFIG
    ]  # fmt: skip

  def stored_dtype(self, path: typing.Path) -> np.dtype:
    """dtype of a parameter in the model itself, before anything is folded.

    A parameter that only the adapter has is as the model's first float is.
    """
    specs = self._model.specs()
    spec = specs.get(self._aliases.get(path, path))
    if spec is None:
      spec = next(s for s in specs.values() if s.dtype.kind not in 'iub')
    return spec.dtype

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    result = {}
    for path in paths:
      if path in self._saved:
        leaf = self._read(self._saved[path])
      else:
        source = self._aliases.get(path, path)
        leaf = self._model.leaves([source])[source]
      if path in self._edits:
        leaf = np.asarray(leaf).astype(np.float32)
        for edit in self._edits[path]:
          leaf = edit(leaf)
      result[path] = leaf
    return result

  # What the adapter is --------------------------------------------------------

  def _known_kind(self) -> base_lib.Kind:
    name = str(self._config.get('peft_type') or '').upper()
    if name in kinds.KINDS:
      kind = kinds.KINDS[name]
      reason = kind.refuse(self._config) if kind.refuse else None
      if reason is None and self._config.get('megatron_config'):
        reason = 'megatron_config is set'
    else:
      kind = None
      reason = kinds.REFUSED.get(
        name, f'known are {", ".join(sorted({*kinds.KINDS, *kinds.REFUSED}))}'
      )
    if reason is not None or kind is None:
      raise errors.CheckpointError(
        f'{self._folder} is an adapter of kind {name or "(none)"}, which cannot '
        f'be folded into a model: {reason}.'
        + (f' {_MERGE}.' if reason in kinds.MERGED_BY_PEFT else '')
      )
    return kind

  def _weights(self):
    weights = self._folder / WEIGHTS
    if not weights.is_file():
      raise errors.CheckpointError(
        f'{self._folder} has {CONFIG} but no {WEIGHTS}. A '
        'pickle (.bin) is never read: save the adapter with '
        '`model.save_pretrained(DIR, safe_serialization=True)`.'
      )
    return safetensors.SafetensorsStore(weights)

  def _read_parts(self, parts):
    return {part: self._read(name) for part, name in parts}

  def _read(self, name):
    leaf = np.asarray(self._adapter.leaves([name])[name])
    whole = leaf.dtype.kind in 'iu'
    return leaf if whole else leaf.astype(np.float32)

  # Heads ----------------------------------------------------------------------

  def _untie(self, names):
    """A head and an embedding that the adapter changes apart are two arrays.

    Rows of tokens are the exception: PEFT trains them for both.
    """
    for head, embedding in dict(self.tied).items():
      changed = {*names.saved, *(f'{m}.weight' for m, _ in names.layers)}
      if not changed & {head, embedding}:
        continue
      if self._config.get('ensure_weight_tying') and head not in changed:
        continue  # saved once, for both
      del self._tied[head]
      if head not in self._specs:
        self._aliases[head] = embedding
        self._specs[head] = self._specs[embedding]
      self.untied.add(head)
      self.config.update(ties.untied(self._model_config()))
      self.remarks.append(
        f'{self._folder} changes {head} or {embedding}, which {self._model.name}'
        ' ties: they are two in the result'
      )

  # Whole parameters -----------------------------------------------------------

  def _save(self, leaf, name):
    spec = self._adapter.specs()[name]
    own = self._specs.get(leaf)
    if own is None:
      modules = (*(self._config.get('modules_to_save') or ()), *_HEADS)
      if not names_lib.is_within(leaf, modules):
        raise errors.CheckpointError(self._nowhere(name, leaf))
      self.remarks.append(
        f'{leaf} {list(spec.shape)} comes from {self._folder}: config.json of '
        'the result must name the architecture and the labels that go with it'
      )
    elif own.shape != spec.shape:
      raise errors.CheckpointError(
        f'{self._folder}: {name} is {list(spec.shape)}, but {leaf} of '
        f'{self._model.name} is {list(own.shape)}. If tokens were added before '
        'training, add them to the base first '
        f'(`model.resize_token_embeddings({spec.shape[0]})`).'
      )
    self._saved[leaf] = name
    self._specs[leaf] = typing.LeafSpec(
      spec.shape, np.dtype(np.float32), spec.axes
    )

  def _nowhere(self, name, leaf):
    where = f'{self._model.name} has no {leaf}'
    if self._config.get('target_parameters') and name.endswith('.weight'):
      return (
        f'{self._folder}: {name} is of target_parameters '
        f'{self._config["target_parameters"]}, which transformers may put '
        f'together on loading, and {where}. {_MERGE}.'
      )
    if leaf.endswith('.bias'):
      return (
        f'{self._folder}: {name} was trained with bias: '
        f'{self._config.get("bias")!r}, and {where}. Is this the model that the '
        'adapter was trained on?'
      )
    return (
      f'{self._folder}: {name} belongs to no parameter of {self._model.name} '
      f'(looked for {leaf}). Is this the model that the adapter was trained on?'
    )

  # Rows of tokens -------------------------------------------------------------

  def _fold_tokens(self, module, name):
    leaf = f'{module}.weight'
    if leaf not in self._specs and leaf in self.tied:
      return  # the same rows again, for the tied head
    if leaf not in self._specs:
      raise errors.CheckpointError(self._nowhere(name, leaf))
    rows = self._config.get('trainable_token_indices')
    if rows is None:
      rows = self._config.get('token_indices')
    if isinstance(rows, dict):
      own = [r for key, r in rows.items() if f'.{module}'.endswith(f'.{key}')]
      rows = own[0] if own else None
    shape = self._adapter.specs()[name].shape
    table = self._specs[leaf].shape
    if not isinstance(rows, list) or shape != (len(rows), *table[1:]) or (
      rows and not 0 <= min(rows) <= max(rows) < table[0]
    ):  # fmt: skip
      raise errors.CheckpointError(
        f'{self._folder}: {name} is {list(shape)} for the tokens {rows}, and '
        f'{leaf} of {self._model.name} is {list(table)}: these do not fit.'
      )

    def edit(leaf):
      leaf = leaf.copy()
      leaf[rows] = self._read(name)
      return leaf

    self._edits.setdefault(leaf, []).append(edit)

  # Layers ---------------------------------------------------------------------

  def _fold_layers(self, layers):
    conv1d = stored_transposed.find(self._model.specs())
    taken: set[str] = set()
    # The parameter wrapped first lies deepest.
    for (module, _), parts in sorted(layers.items(), key=lambda x: -x[0][1]):
      sizes = {p: self._adapter.specs()[n].shape for p, n in parts.items()}
      if self._config.get('target_parameters') and self._fold_experts(
        module, parts, sizes, taken
      ):
        continue
      leaf = f'{module}.weight'
      if leaf not in self._specs:
        leaf = f'{module}.in_proj_weight'  # attention of PyTorch
      if leaf not in self._specs:
        raise errors.CheckpointError(
          self._nowhere(next(iter(parts.values())), f'{module}.weight')
        )
      self._check_parts(module, parts)
      turned = self._is_transposed(leaf, module, sizes, conv1d)
      self._add(leaf, self._kind.weight, module, parts, turned)
      if self._kind.bias is not None and f'{module}.bias' in self._specs:
        self._add(f'{module}.bias', self._kind.bias, module, parts, False)
      elif 'lora_B.bias' in parts:
        raise errors.CheckpointError(
          f'{self._folder}: {parts["lora_B.bias"]} is a bias (lora_bias) for '
          f'{module}, which has none in {self._model.name}: no parameter can '
          'take it. PEFT cannot merge this either.'
        )

  def _fold_experts(self, module, parts, sizes, taken):
    """Folds into a parameter of all experts; False if the module has none."""
    if not {'lora_A', 'lora_B'} <= set(parts):
      return False
    found = experts.find(
      module, self._model.specs(), self._config['target_parameters']
    )
    own = [
      fit
      for fit in experts.fitting(
        found, sizes, self._model_config().get('model_type')
      )
      if f'{module}.{fit.name}' not in taken
    ]
    if len(own) > 1:
      names = ' and '.join(sorted({fit.name for fit in own}))
      raise errors.CheckpointError(
        f'{self._folder}: the adapter of {module} fits {names} in '
        f'{len(own)} ways, and nothing tells which one is meant. {_MERGE}.'
      )
    for fit in own:
      whole = f'{module}.{fit.name}'
      taken.add(whole)
      for leaf, part in fit.leaves.items():
        function = functools.partial(experts.weight, part=part)
        self._add(leaf, function, whole, parts, fit.inputs_first)
    return bool(own)

  def _model_config(self):
    path = str(self._model.provenance.get('path', ''))
    return checkpoint.read_config(path) or {}

  def _add(self, leaf, function, module, parts, turned):
    shared = self._shared

    def edit(array):
      own = self._parts(tuple(parts.items()))
      layer = base_lib.Layer(module, own, shared, self._config)
      array = array.swapaxes(-1, -2) if turned else array
      try:
        array = function(array, layer)
      except (ValueError, IndexError, KeyError) as error:
        sizes = {part: list(tensor.shape) for part, tensor in own.items()}
        raise errors.CheckpointError(
          f'{self._folder}: {leaf} is {list(array.shape)} in '
          f'{self._model.name}, which {sizes} does not fit ({error}).'
        ) from error
      return array.swapaxes(-1, -2) if turned else array

    self._edits.setdefault(leaf, []).append(edit)

  def _check_parts(self, module, parts):
    if not any(need <= set(parts) for need in self._kind.needs):
      needed = ' or '.join(str(sorted(need)) for need in self._kind.needs)
      raise errors.CheckpointError(
        f'{self._folder}: {module} has {sorted(parts)}; it needs {needed}.'
      )

  def _is_transposed(self, leaf, module, sizes, conv1d):
    """Whether a kernel must be turned to be `[outputs, inputs, ...]`."""
    shape = self._specs[leaf].shape
    turned = len(shape) == 2 and any(
      part.endswith('_embedding_A') for part in sizes
    )
    if not turned and len(shape) == 2:
      turned = bool(
        stored_transposed.is_one(module)
        if conv1d
        else conv1d is None and self._config.get('fan_in_fan_out')
      )
      ways = [
        way for way in (turned, not turned) if self._fits(shape, sizes, way)
      ]
      turned = ways[0] if ways else turned
    if not self._fits(shape, sizes, turned):
      raise errors.CheckpointError(
        f'{self._folder}: {leaf} is {list(shape)} in {self._model.name}, which '
        f'{ {p: list(s) for p, s in sizes.items()} } does not fit.'
      )
    return turned

  def _fits(self, shape, sizes, turned):
    shape = shape[::-1] if turned else shape
    return base_lib.fits(shape, self._kind.shapes, sizes)

  def _check_complete(self, names):
    missing = [part for part in self._kind.shared if part not in names.shared]
    if missing:
      raise errors.CheckpointError(
        f'{self._folder} does not hold {" and ".join(missing)}, which PEFT '
        "would draw again by PyTorch's random generator. Save it with "
        f'`save_projection=True`. {_MERGE}.'
      )
    if not (names.layers or names.saved or names.tokens):
      raise errors.CheckpointError(
        f'{self._folder} holds no tensor: nothing would be folded. DeepSpeed '
        'saves such files when its shards are not gathered first.'
      )
