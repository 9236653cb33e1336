# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA of experts that a model holds as one parameter (`target_parameters`).

transformers holds the experts of a layer as `gate_up_proj` [experts, 2 * width,
inputs] and `down_proj` [experts, inputs, width], some models with the last two
axes exchanged. Most checkpoints store each expert on its own and are put
together on loading; adapters are of what is in memory. The tensors of an
adapter do not name the parameter: PEFT wraps one around the other, and shapes
tell which is which.
"""

from collections.abc import Mapping
import re
from typing import NamedTuple

import numpy as np

from mergejax.checkpoints.peft import base
from mergejax.checkpoints.peft import lora
from mergejax.core import typing

# Models whose experts are [experts, inputs, outputs].
_INPUTS_FIRST = ('gpt_oss', 'llama4', 'llama4_text')
# Names that a checkpoint may have for `gate`, `up` and `down`.
_TRIPLES = (('gate_proj', 'up_proj', 'down_proj'), ('w1', 'w3', 'w2'))


class Part(NamedTuple):
  """Where a leaf lies in a parameter of all experts.

  Attributes:
    shape: of the whole parameter.
    expert: number of the expert, None if the leaf is the whole parameter.
    rows: its rows, of the outputs of an expert.
  """

  shape: tuple[int, ...]
  expert: int | None
  rows: slice


def find(
  module: str, specs: typing.SpecTree, targets: list[str]
) -> dict[str, dict[typing.Path, Part]]:
  """The parameters of a module that may be adapted directly.

  Args:
    module: path of the module as the adapter names it.
    specs: the checkpoint.
    targets: `target_parameters`.

  Returns:
    `{parameter: {leaf: part}}`.
  """
  found: dict[str, dict[typing.Path, Part]] = {}
  for name in targets:
    parent, _, last = name.rpartition('.')
    if not f'.{module}'.endswith(f'.{parent}'):
      continue
    whole = specs.get(f'{module}.{last}')
    if whole is not None:
      part = Part(whole.shape, None, slice(None))
      found[last] = {f'{module}.{last}': part}
    elif last in ('gate_up_proj', 'down_proj'):
      leaves = _split(module, specs, last)
      if leaves:
        found[last] = leaves
  return found


def _split(module, specs, last):
  places = [module, module.replace('.mlp.', '.block_sparse_moe.')]
  for place in places:
    own = [path for path in specs if path.startswith(f'{place}.')]
    for gate, up, down in _TRIPLES:
      last_name = re.compile(rf'{re.escape(place)}\.(\d+)\.{gate}\.weight')
      matches = (last_name.fullmatch(path) for path in own)
      numbers = [int(match[1]) for match in matches if match]
      names = (gate, up) if last == 'gate_up_proj' else (down,)
      leaves = {}
      for number in sorted(numbers):
        for i, name in enumerate(names):
          path = f'{place}.{number}.{name}.weight'
          rows, columns = specs[path].shape
          shape = (len(numbers), rows * len(names), columns)
          leaves[path] = Part(shape, number, slice(i * rows, (i + 1) * rows))
      if leaves:
        return leaves
  return {}


class Fit(NamedTuple):
  """A parameter that an adapter may be of.

  Attributes:
    name: of the parameter in its module.
    leaves: `{leaf: part}` of the checkpoint.
    inputs_first: stored as [experts, inputs, outputs].
  """

  name: str
  leaves: dict[typing.Path, Part]
  inputs_first: bool


def fitting(
  found: Mapping[str, dict[typing.Path, Part]],
  sizes: Mapping[str, tuple[int, ...]],
  model_type: str | None,
) -> list[Fit]:
  """The parameters, and the ways they may be stored, that an adapter fits.

  Args:
    found: what `find` gives.
    sizes: shapes of `lora_A` [experts * r, inputs], `lora_B` [outputs, ...].
    model_type: of `config.json`; it decides where inputs equal outputs.
  """
  a, b = sizes['lora_A'], sizes['lora_B']
  fits = []
  for name, leaves in found.items():
    shape = next(iter(leaves.values())).shape
    if not len(shape) - 1 == len(a) == len(b) == 2:
      continue
    if a[0] != b[1] or a[0] % shape[0]:
      continue
    ways = [(b[0], a[1]) == shape[1:], (a[1], b[0]) == shape[1:]]
    if all(ways) and model_type in _INPUTS_FIRST:
      ways[0] = False
    fits += [Fit(name, leaves, way == 1) for way in (0, 1) if ways[way]]
  return fits


def weight(kernel: np.ndarray, layer: base.Layer, part: Part) -> np.ndarray:
  """`W_e + s B_e A_e` for every expert, or for the one that the leaf is.

  Args:
    kernel: <float32>[experts, outputs, inputs], or [rows, inputs] of one.
    layer: `lora_A` [experts * r, inputs], expert by expert; `lora_B`
      [outputs, r * experts], rank by rank.
    part: what the kernel is.
  """
  count = part.shape[0]
  a, b = layer.parts['lora_A'], layer.parts['lora_B']
  a = a.reshape(count, -1, a.shape[-1])
  rank = a.shape[1]
  b = b.reshape(len(b), rank, count).transpose(2, 0, 1)
  scale = lora.scale(layer, rank)
  if part.expert is None:
    return kernel + scale * (b @ a)
  return kernel + scale * (b[part.expert, part.rows] @ a[part.expert])
