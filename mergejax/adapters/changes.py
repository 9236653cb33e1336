# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format as what they change, apart from any base.

Merging these is merging models whose every other parameter is equal, at the
size of the adapters. The mean of the factors of two LoRAs is not a factor of
their mean, so a LoRA is shown as its products; see `ChangeStore`.
"""

from collections.abc import Mapping, Sequence
import functools
import os
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import base as base_lib
from mergejax.checkpoints.peft import fold
from mergejax.checkpoints.peft import kinds
from mergejax.checkpoints.peft import lora
from mergejax.checkpoints.peft import names as names_lib
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

# Says which base an adapter is of; PEFT leaves it alone.
BESIDE = 'mergejax_adapter.json'
# Kinds, and the spaces that they can be merged in, the usual one first.
DELTA, FACTORS, VECTORS = 'delta', 'factors', 'vectors'
SPACES: Mapping[str, tuple[str, ...]] = {
  'LORA': (DELTA, FACTORS),
  'IA3': (VECTORS,),
  'PROMPT_TUNING': (VECTORS,),
}
# What an adapter that changes nothing holds.
_NEUTRAL = {('LORA', DELTA): 0.0, ('IA3', VECTORS): 1.0}
_FOLD = (
  'A merge of BASE+ADAPTER into a whole model (without `format: adapter`) folds '
  'what can be folded'
)


def base_of(path: os.PathLike | str) -> str | None:
  """The fingerprint of an adapter's base, None if its files do not tell it."""
  file = pathlib.Path(path).expanduser() / BESIDE
  return checkpoint.read_json(file).get('base') if file.is_file() else None


def check_files(path: os.PathLike | str) -> None:
  """Raises a `CheckpointError` unless a directory has PEFT's two files."""
  for name in (fold.CONFIG, fold.WEIGHTS):
    if not (pathlib.Path(path).expanduser() / name).is_file():
      raise errors.CheckpointError(
        f'{path} has no {name}: an adapter is a directory with {fold.CONFIG} '
        f'and {fold.WEIGHTS}, as PEFT saves it.'
      )


def parts(path: os.PathLike | str) -> tuple[str, str | None]:
  """`(base, adapter)` of `BASE+ADAPTER`; no adapter where it is one path.

  Of several pluses, which names of folders may have, the first counts that has
  folders on both sides, or else on one.

  Example:
    >>> parts('t5+books'), parts('t5')
    (('t5', 'books'), ('t5', None))
  """
  name = str(path)
  there = lambda part: part and pathlib.Path(part).expanduser().exists()
  splits = [
    (name[:at], name[at + 1 :]) for at, sign in enumerate(name) if sign == '+'
  ]
  if not splits or there(name):
    return name, None
  return max(splits, key=lambda split: sum(bool(there(x)) for x in split))


class ChangeStore(base.ParamStore):
  """What an adapter changes, as leaves to merge, all float32.

  LoRA: `MODULE.weight` is `s B A`, `<float32>[outputs, inputs]`, made when it is
  read; in the space 'factors', the tensors of the file. (IA)^3: `MODULE.ia3_l`,
  `[outputs, 1]` or `[1, inputs]`. A prompt: `prompt_embeddings`, `[tokens,
  width]`.

  Attributes:
    kind: 'LORA', 'IA3' or 'PROMPT_TUNING'.
    space: 'delta', 'factors' or 'vectors'.
    config: `adapter_config.json`.
    base: fingerprint of the base it was trained on, None if it is not told.
    ranks: `{module: rank}` of LoRA.
    absent: leaves of others that it leaves as they are; see `extend`.

  Example:
    >>> import tempfile
    >>> from mergejax.adapters import written
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'a'
    >>> _ = written.write_lora(path, {'q.weight': np.eye(3)}, {}, rank=1)
    >>> ChangeStore(path).specs()['q.weight'].shape
    (3, 3)
  """

  def __init__(self, path: os.PathLike | str, space: str | None = None):
    """Opens an adapter; reads headers only.

    Args:
      path: a directory that PEFT or `adapters.save` wrote.
      space: see above; by default 'delta' of LoRA, 'vectors' of others.

    Raises:
      CheckpointError: no adapter; one of another kind, or that changes its base
        in a way that depends on the base (DoRA, ...), or changes more than
        kernels.
      ConfigError: a space that the kind does not have.
    """
    self._folder = pathlib.Path(path).expanduser()
    self.provenance = {'format': 'adapter', 'path': str(path)}
    check_files(path)
    self.config = checkpoint.read_json(self._folder / fold.CONFIG)
    self.kind = str(self.config.get('peft_type') or '').upper()
    if self.kind not in SPACES:
      raise errors.CheckpointError(
        f'{path} is an adapter of the kind {self.kind or "(none)"}; adapters '
        f'are merged as such if they are {", ".join(SPACES)}. {_FOLD}.'
      )
    own = SPACES[self.kind]
    self.space = own[0] if space is None else space
    if self.space not in own:
      raise errors.ConfigError(
        f'{path} is {self.kind}, which is merged in the space '
        f'{" or ".join(own)}, not {space!r}.'
      )
    self.base = base_of(self._folder)
    self._file = safetensors.SafetensorsStore(self._folder / fold.WEIGHTS)
    self._layers = self._read_layers()
    self._specs = self._own_specs()
    self.absent: dict[typing.Path, typing.LeafSpec] = {}

  @property
  def ranks(self) -> dict[str, int]:
    """`{module: rank}` of LoRA; empty for others."""
    if self.kind != 'LORA':
      return {}
    sizes = self._file.specs()
    return {m: sizes[p['lora_A']].shape[0] for m, p in self._layers.items()}

  @property
  def file_dtype(self) -> np.dtype:
    """The dtype that the adapter is stored in."""
    return next(iter(self._file.specs().values())).dtype

  @property
  def neutral(self) -> float | None:
    """What an adapter that changes nothing holds everywhere, None if nothing."""
    return _NEUTRAL.get((self.kind, self.space))

  def specs(self) -> typing.SpecTree:
    return {**self._specs, **self.absent}

  def files(self) -> list[pathlib.Path]:
    own = [self._folder / name for name in (fold.CONFIG, BESIDE)]
    return [*self._file.files(), *(file for file in own if file.is_file())]

  def extend(self, specs: typing.SpecTree) -> None:
    """Shows further leaves, which this adapter leaves as they are."""
    self.absent = {p: s for p, s in specs.items() if p not in self._specs}

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    return {path: self._leaf(path) for path in paths}

  def scale(self, module: str) -> np.float32:
    """`s` of a module of LoRA."""
    layer = base_lib.Layer(module, {}, {}, self.config)
    return lora.scale(layer, self.ranks[module])

  def _leaf(self, path):
    if path in self.absent:
      return np.full(self.absent[path].shape, self.neutral, np.float32)
    if self.space != DELTA:
      return self._read(self._sources[path])
    module = path.removesuffix('.weight')
    a, b = (self._read(self._layers[module][n]) for n in ('lora_A', 'lora_B'))
    return self.scale(module) * (b @ a)

  def _read(self, name):
    return np.asarray(self._file.leaves([name])[name]).astype(np.float32)

  # What it is -----------------------------------------------------------------

  def _read_layers(self):
    """`{module: {tensor: path in the file}}`; what is more is refused."""
    specs = self._file.specs()
    if self.kind == 'PROMPT_TUNING':
      if set(specs) != {'prompt_embeddings'}:
        self._refuse(f'it holds {errors.some(sorted(specs))}, not one prompt')
      return {'': {'prompt_embeddings': 'prompt_embeddings'}}
    if self.kind == 'LORA':
      reason = lora.refuse(self.config) or lora.beyond_products(self.config)
      if reason is not None:
        self._refuse(reason)
    found = names_lib.read(specs, kinds.KINDS[self.kind])
    if more := [*found.saved, *found.tokens]:
      self._refuse(
        f'it has parameters that were trained whole ({errors.some(more)})'
      )
    wanted = {'lora_A', 'lora_B'} if self.kind == 'LORA' else {'ia3_l'}
    layers = {}
    for (module, _), parts in found.layers.items():
      flat = all(len(specs[name].shape) == 2 for name in parts.values())
      if set(parts) != wanted or not flat:
        self._refuse(f'it changes {module} by more than a kernel of two axes')
      layers[module] = parts
      if self.kind == 'LORA':
        a, b = specs[parts['lora_A']].shape, specs[parts['lora_B']].shape
        if a[0] != b[1]:
          self._refuse(f'it has factors {list(b)} and {list(a)} at {module}')
    if not layers:
      self._refuse('it holds no tensor')
    return layers

  def _refuse(self, reason):
    raise errors.CheckpointError(
      f'{self.name} cannot be merged as an adapter: {reason}. {_FOLD}.'
    )

  @functools.cached_property
  def _sources(self):
    """`{path: path in the file}` where leaves are the file's own."""
    return {
      name if not module else f'{module}.{name}': file
      for module, parts in self._layers.items()
      for name, file in parts.items()
    }

  def _own_specs(self):
    sizes, found = self._file.specs(), {}
    if self.space == DELTA:
      for module, parts in self._layers.items():
        rows, columns = (
          sizes[parts['lora_B']].shape[0], sizes[parts['lora_A']].shape[1],
        )  # fmt: skip
        found[f'{module}.weight'] = rows, columns
    else:
      found = {path: sizes[f].shape for path, f in self._sources.items()}
    # PEFT's tensors have outputs, or what stands for them, in front.
    names = (axes_lib.OUTPUTS, axes_lib.INPUTS)
    wide = np.dtype(np.float32)
    return {p: typing.LeafSpec(s, wide, names) for p, s in found.items()}


class NeutralStore(base.ParamStore):
  """The adapter that changes nothing: the base, seen from its adapters."""

  def __init__(self, specs: typing.SpecTree, value: float, name: str):
    self._specs, self._value = dict(specs), np.float32(value)
    self.provenance = {'format': 'adapter', 'path': name}

  def specs(self) -> typing.SpecTree:
    return self._specs

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    shape = lambda path: self._specs[path].shape
    return {path: np.full(shape(path), self._value) for path in paths}

  def files(self) -> list[pathlib.Path]:
    return []


def together(
  stores: Sequence[ChangeStore], base_name: str = 'the base'
) -> NeutralStore | None:
  """Brings adapters of one base to one form, and gives what they start from.

  A module that only some of them adapt is one that the others leave as it is.

  Args:
    stores: the adapters; they get each other's leaves.
    base_name: how messages call the base.

  Returns:
    What an adapter holds that changes nothing; None where there is none, as of
    prompts.

  Raises:
    CheckpointError: adapters of different bases, by their fingerprints.
    StructureError: of different kinds, or of kernels of different shapes.
  """
  first, *others = stores
  for other in others:
    if (other.kind, other.space) != (first.kind, first.space):
      raise errors.StructureError(
        f'{first.name} is {first.kind} ({first.space}) and {other.name} is '
        f'{other.kind} ({other.space}): adapters of one kind are merged. Without '
        '`format: adapter` each is folded into the base, and models are merged.'
      )
  told = {one.base: one.name for one in stores if one.base is not None}
  if len(told) > 1:
    lines = [f'{name}: {mark}' for mark, name in told.items()]
    raise errors.CheckpointError(
      'These adapters were trained on different bases, by the fingerprints they '
      f'carry, so their changes do not add up:\n{errors.listed(lines)}'
    )
  specs: dict[typing.Path, typing.LeafSpec] = {}
  owner = {}
  for one in stores:
    for path, spec in one.specs().items():
      known = specs.setdefault(path, spec)
      owner.setdefault(path, one.name)
      if known.shape != spec.shape:
        raise errors.StructureError(_differing(path, owner[path], known, one))
  if first.neutral is None:
    for one in stores:
      tree.check_same(
        specs, one.specs(),
        expected_name=' and '.join(x.name for x in stores if x is not one),
        given_name=one.name,
      )  # fmt: skip
  if first.space == FACTORS:
    _check_factors(stores)
  for one in stores:
    one.extend(specs)
  if first.neutral is None:
    return None
  return NeutralStore(specs, first.neutral, base_name)


def _differing(path, name, spec, other):
  what = f'{path} is {list(spec.shape)} in {name} and '
  what += f'{list(other.specs()[path].shape)} in {other.name}: '
  if other.space == FACTORS:
    return what + (
      'factors of different ranks have no mean. Merge the products '
      '(`space: delta`), whose ranks may differ.'
    )
  if other.kind == 'PROMPT_TUNING':
    return what + 'prompts of one length are merged.'
  return what + 'they are adapters of different models.'


def _check_factors(stores):
  """Factors stand for the same product only at one scale."""
  scales = {
    float(one.scale(module)): one.name for one in stores for module in one.ranks
  }
  if len(scales) > 1:
    lines = [f'{name}: {scale:g}' for scale, name in scales.items()]
    raise errors.StructureError(
      'These adapters scale their products (alpha / rank) differently, so their '
      'factors have no common mean. Merge the products (`space: delta`):\n'
      f'{errors.listed(lines)}'
    )
