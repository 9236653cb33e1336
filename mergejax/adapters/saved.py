# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters on disk, in PEFT's own layout: LoRA, (IA)^3, prompts and Poly.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's, with the names
that the base's family has at Hugging Face; a third file,
`mergejax_adapter.json`, says which base the adapter is of.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from mergejax import models
from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import base as base_lib
from mergejax.adapters import changes
from mergejax.adapters import low_rank
from mergejax.adapters import poly_tensors
from mergejax.adapters import prompts
from mergejax.adapters import routes
from mergejax.adapters import scales
from mergejax.adapters import sites as sites_lib
from mergejax.adapters import tensors
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing

_BESIDE = changes.BESIDE
_KINDS = {
  'LORA': 'lora', 'IA3': 'ia3', 'PROMPT_TUNING': 'prompt', 'POLY': 'poly',
}  # fmt: skip


def has_layout(adapter: base_lib.Adapter) -> bool:
  """Whether PEFT's files have a place for an adapter."""
  if isinstance(adapter, prompts.Prompt):
    return adapter.tasks is None
  if isinstance(adapter, routes.Poly):
    return poly_tensors.as_peft(adapter)
  return isinstance(adapter, (low_rank.Lora, scales.Ia3))


def save(
  path: os.PathLike | str,
  family: adapted_lib.Adapted,
  params: typing.Tree,
  *,
  base_name: str | None = None,
  tasks: Sequence[str] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes the adapter of a model, without the base, as PEFT writes it.

  Args:
    path: a directory to create; all of it or nothing is there.
    family: from `adapt`, of `lora`, `ia3`, `prompt` or `poly`.
    params: of the adapted model.
    base_name: path or name of the base, for PEFT to load it by.
    tasks: names of the tasks of an inventory by their numbers, to be noted.
    overwrite: put it in the place of one that is there.

  Raises:
    ConfigError: another kind of adapter; of a `bank` one expert is saved,
      adapted by itself (`pick`), and of a `poly` that PEFT does not compute the
      LoRA of a task (`of_task`); one that adapts parameters that are not called
      `kernel`.
    CheckpointError: the directory is there already.
  """
  base, own = family.split(params)
  adapter = family.adapter
  if not has_layout(adapter):
    raise errors.ConfigError(
      f"{type(adapter).__name__} has no layout among PEFT's: save lora(), "
      'ia3(), a single prompt(), or a poly() of alpha 1, factors mixed by sigmoid '
      'gates, and a selector for every map. Of a bank or another inventory save '
      'one expert, taken out with `pick` or `of_task`, on the base adapted with '
      '`.expert`.'
    )
  if isinstance(adapter, sites_lib.LayerAdapter):
    _check_kernels(adapter.sites(family.base_specs))
  if isinstance(adapter, low_rank.Lora):
    leaves, config = tensors.of_lora(family, adapter, own)
  elif isinstance(adapter, routes.Poly):
    leaves, config = poly_tensors.of_poly(family, adapter, own)
  elif isinstance(adapter, scales.Ia3):
    leaves, config = tensors.of_ia3(family, adapter, own)
  else:
    assert isinstance(adapter, prompts.Prompt)
    leaves, config = tensors.of_prompt(family, adapter, own)
  beside: dict[str, Any] = {'base': tensors.fingerprint(family.plain, base)}
  if tasks is not None:
    beside['tasks'] = list(tasks)
  config = {**config, 'base_model_name_or_path': base_name}
  with files.atomic_path(pathlib.Path(path), overwrite=overwrite) as temporary:
    temporary.mkdir()
    safetensors.write(temporary / fold.WEIGHTS, leaves)
    for name, content in ((fold.CONFIG, config), (_BESIDE, beside)):
      (temporary / name).write_text(json.dumps(content, indent=2) + '\n')


def _check_kernels(sites):
  for site in sites:
    if site.path.rpartition('/')[2] != 'kernel':
      raise errors.ConfigError(
        f'{site.path!r} is no `kernel` of a module, and PEFT names modules: leave '
        'it out of the targets, or keep the leaves of `family.split(params)` '
        'with `mj.save_checkpoint`.'
      )


def load(
  path: os.PathLike | str,
  model: Any,
  params: typing.Tree | None = None,
) -> tuple[Any, typing.Tree]:
  """Reads an adapter that `save` or PEFT wrote.

  Args:
    path: its directory.
    model: the base's module or family; its layers may be scanned or not.
    params: the base's parameters, to be compared with those that the adapter
      was trained on, where its files tell them; None compares nothing.

  Returns:
    `(family, leaves)`: the adapted family, and what `family.joined(params,
    leaves)` puts beside the base.

  Raises:
    CheckpointError: no adapter, an adapter of another base, or of a kind that
      is not computed here as it is: it can still be folded, by a merge.
    StructureError: it adapts what the model has not.
  """
  folder = pathlib.Path(path).expanduser()
  config, beside = about(folder)
  family = models.family_of(model)
  expected = beside.get('base')
  if params is not None and expected is not None:
    found = tensors.fingerprint(family, params)
    if found != expected:
      raise errors.CheckpointError(
        f'{path} was trained on another base (fingerprint {expected}, that of '
        f'the given parameters is {found}): its numbers mean nothing here. Take '
        'the base it was trained on; without `params` nothing is compared.'
      )
  store = checkpoint.open_checkpoint(folder / fold.WEIGHTS)
  leaves = {
    name: np.asarray(leaf, np.float32)
    for name, leaf in store.leaves(list(store.specs())).items()
  }
  read = {
    'LORA': tensors.to_lora,
    'IA3': tensors.to_ia3,
    'PROMPT_TUNING': tensors.to_prompt,
    'POLY': poly_tensors.to_poly,
  }[config['peft_type']]
  try:
    adapter, own = read(family, config, leaves)
  except errors.UserError as error:
    raise error.at(path) from error
  made = adapted_lib.adapt(family, adapter)
  return made, tree.unflatten(own)


def about(
  path: os.PathLike | str,
) -> tuple[dict[str, Any], Mapping[str, Any]]:
  """`(adapter_config.json, what is known of its base)` of a directory.

  Raises:
    CheckpointError: it is no adapter, or of a kind that is not read.
  """
  folder = pathlib.Path(path).expanduser()
  changes.check_files(folder)
  config = checkpoint.read_json(folder / fold.CONFIG)
  if config.get('peft_type') not in _KINDS:
    raise errors.CheckpointError(
      f'{path} is an adapter of the kind {config.get("peft_type")!r}; those of '
      f'{", ".join(_KINDS)} are put to work as they are. Others fold into their '
      'base where they can: name them in a recipe, BASE+ADAPTER.'
    )
  beside = folder / _BESIDE
  return config, checkpoint.read_json(beside) if beside.exists() else {}


@dataclasses.dataclass(frozen=True)
class Card:
  """What a saved adapter is, from its headers.

  Attributes:
    kind: 'lora', 'ia3', 'prompt' or 'poly'; others by their own names.
    base: what it says of its base: a name, and its fingerprint.
    targets: how many modules it changes.
    ranks: their ranks, of LoRA and Poly.
    parameters: numbers in all.
  """

  kind: str
  base: tuple[str | None, str | None]
  targets: int
  ranks: tuple[int, ...]
  parameters: int

  def __str__(self) -> str:
    name, fingerprint = self.base
    lines = [
      f'{self.kind}: {self.parameters:,} numbers in {self.targets} modules',
      f'base: {name or "not told"}'
      + (f' (fingerprint {fingerprint})' if fingerprint else ''),
    ]
    if self.ranks:
      lines.append(f'rank: {", ".join(map(str, self.ranks))}')
    return '\n'.join(lines)


def is_own(path: os.PathLike | str) -> bool:
  """Whether a directory has an adapter that PEFT has no files for."""
  folder = pathlib.Path(path).expanduser()
  return (folder / _BESIDE).is_file() and not fold.is_adapter(folder)


def card(path: os.PathLike | str) -> Card:
  """What a saved adapter is; reads no weight.

  Args:
    path: in PEFT's files, or as `mergejax train` writes other kinds.

  Raises:
    CheckpointError: see `about`.
  """
  if is_own(path):
    folder = pathlib.Path(path).expanduser()
    beside = checkpoint.read_json(folder / _BESIDE)
    specs = checkpoint.open_checkpoint(folder).specs()
    return Card(
      str(beside.get('kind')), (beside.get('name'), beside.get('base')),
      len({place.rpartition('/')[0] for place in specs}), (),
      sum(spec.size for spec in specs.values()),
    )  # fmt: skip
  config, beside = about(path)
  specs = checkpoint.open_checkpoint(
    pathlib.Path(path).expanduser() / fold.WEIGHTS
  ).specs()
  modules = {tensors.module_of(name) for name in specs}
  ranks = {s.shape[0] for n, s in specs.items() if '.lora_A' in n}
  ranks |= {s.shape[-1] for n, s in specs.items() if n.endswith('poly_lora_A')}
  return Card(
    _KINDS[config['peft_type']],
    (config.get('base_model_name_or_path'), beside.get('base')),
    len(modules),
    tuple(sorted(ranks)),
    sum(spec.size for spec in specs.values()),
  )
