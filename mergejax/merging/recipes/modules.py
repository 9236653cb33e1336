# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`modules:` of a recipe: parts of a model with models or slices of their own.

modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 24]}]
      - sources: [{model: b, layer_range: [8, 32]}]
  vision_tower:
    models: [{model: a}, {model: b}]
    parameters: {weight: [1, 0]}   # along the layers of this module
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Module:
  """A part of the result that is merged in its own way.

  Attributes:
    name: as mergekit calls it (`text_decoder`, `vision_tower`, `encoder`, ...),
      or part of the parameters' names.
    slices: what it is stacked from; one slice for `models`.
    sliced: whether layers were chosen.
  """

  name: str
  slices: tuple[Any, ...]
  sliced: bool


def read(
  data: Any,
  *,
  mapping: Callable[[Any, tuple[str, ...] | None, str], bool],
  slices: Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], bool]],
  parameters: Callable[[Any, str], Mapping[str, Any]],
) -> tuple[Module, ...]:
  """Reads the modules of a recipe.

  Args:
    data: `{name: {models or slices, parameters}}`.
    mapping: checks that something is a dict of known keys and reports if not.
    slices: reads `models` or `slices`; `(slices, whether layers were chosen)`.
    parameters: reads settings; told where they stand.

  Returns:
    The modules; empty with problems reported where they cannot be read.
  """
  if not mapping(data, None, "'modules'"):
    return ()
  found = []
  for name, entry in data.items():
    what = f'module {name!r}'
    if not mapping(entry, ('models', 'slices', 'parameters'), what):
      continue
    outer = parameters(entry.get('parameters'), f'parameters of {what}')
    own, sliced = slices(entry)
    own = tuple(dataclasses.replace(one, outer=outer) for one in own)
    if own:
      found.append(Module(str(name), own, sliced))
  return tuple(found)
