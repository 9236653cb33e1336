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

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.merging.recipes import parameters as parameters_lib
from mergejax.merging.recipes import sources
from mergejax.methods import entries as methods_lib


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
  slices: tuple[sources.Slice, ...]
  sliced: bool


def read(
  data: Any,
  method: methods_lib.MethodEntry | None,
  base: str | None,
  parameters: Mapping[str, Any],
  report: parameters_lib.Report,
) -> tuple[Module, ...]:
  """Reads the modules of a recipe.

  Args:
    data: `{name: {models or slices, parameters}}`.
    method: what is known of the recipe's method, or None.
    base: the recipe's base model, or None.
    parameters: the recipe's settings for all models.
    report: gets every problem, and what is ignored.

  Returns:
    The modules; without those that cannot be read.
  """
  if not parameters_lib.is_mapping(data, None, "'modules'", report):
    return ()
  result = []
  for name, entry in data.items():
    what = f'module {name!r}'
    known = ('models', 'slices', 'parameters')
    if not parameters_lib.is_mapping(entry, known, what, report):
      continue
    outer = parameters_lib.read(
      entry.get('parameters'), method, f'parameters of {what}', report,
      of_model=False,
    )  # fmt: skip
    slices, sliced = sources.read(entry, method, base, parameters, report)
    slices = tuple(dataclasses.replace(part, outer=outer) for part in slices)
    if slices:
      result.append(Module(str(name), slices, sliced))
  return tuple(result)
