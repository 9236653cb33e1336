# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`models:` or `slices:` of a recipe, or of a module: what is merged.

slices:
  - sources:
      - {model: path/to/a, layer_range: [0, 16]}
      - {model: path/to/b, layer_range: [0, 16], parameters: {weight: 0.5}}
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.merging.recipes import mergekit_words
from mergejax.merging.recipes import model_names
from mergejax.merging.recipes import parameters as parameters_lib
from mergejax.merging.recipes import values
from mergejax.methods import entries as methods_lib


@dataclasses.dataclass(frozen=True)
class Input:
  """One model of a merge, or some of its layers.

  Attributes:
    model: path, or `path+adapter`.
    parameters: its own settings.
    layers: half-open range of its layers, None for all.
  """

  model: str
  parameters: Mapping[str, Any]
  layers: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
  """Some layers of the result, and the inputs they are merged from."""

  inputs: tuple[Input, ...]
  base: str | None
  parameters: Mapping[str, Any]
  # Settings of the module that it belongs to.
  outer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read(
  data: Mapping[str, Any],
  method: methods_lib.MethodEntry | None,
  base: str | None,
  parameters: Mapping[str, Any],
  report: parameters_lib.Report,
) -> tuple[tuple[Slice, ...], bool]:
  """Reads the models or the slices of a recipe, or of one of its modules.

  Args:
    data: the recipe or module, as YAML gave it.
    method: what is known of the recipe's method, or None.
    base: the recipe's base model, or None.
    parameters: the recipe's settings for all models.
    report: gets every problem, and what is ignored.

  Returns:
    `(slices, whether layers were chosen)`; one slice for `models`.
  """
  entries = data.get('models')
  if (entries is None) == (data.get('slices') is None):
    report.problems.append("give either 'models' or 'slices', and not both.")
    return (), False
  if entries is None:
    return _slices(data['slices'], method, base, report), True
  inputs = _inputs(entries, method, 'models', report)
  return (
    _with_base(Slice(inputs, base, {}), method, parameters, report),
  ), False


def _slices(entries, method, base, report) -> tuple[Slice, ...]:
  slices = []
  if not isinstance(entries, list) or not entries:
    report.problems.append("'slices' must be a list of `- sources: [...]`.")
    return ()
  for i, entry in enumerate(entries):
    what = f'slice {i}'
    known = ('sources', 'base_model', 'parameters')
    if not parameters_lib.is_mapping(entry, known, what, report):
      continue
    inputs = _inputs(entry.get('sources'), method, what, report, layers=True)
    lengths = {b - a for a, b in (x.layers for x in inputs if x.layers)}
    if len(lengths) > 1:
      report.problems.append(
        f'{what}: its sources have {sorted(lengths)} layers; they must have '
        'the same number.'
      )
    slice_base = model_names.read(entry.get('base_model'), 'base_model', report)
    parameters = parameters_lib.read(
      entry.get('parameters'), method, what, report, of_model=False
    )
    slices.append(Slice(inputs, slice_base or base, parameters))
  return tuple(slices)


def _inputs(entries, method, what, report, layers=False) -> tuple[Input, ...]:
  """The models that are listed; `layers`: each must say which of its layers."""
  if not isinstance(entries, list) or not entries:
    report.problems.append(f'{what} must be a list of `- model: PATH`.')
    return ()
  known = ('model', 'parameters', *(('layer_range',) if layers else ()))
  inputs = []
  for i, entry in enumerate(entries):
    entry = {'model': entry} if isinstance(entry, str) else entry
    where = f'entry {i} of {what}'
    if not parameters_lib.is_mapping(entry, known, where, report):
      continue
    if not isinstance(entry.get('model'), (str, dict)):
      report.problems.append(f"{where} lacks 'model'.")
      continue
    chosen = None
    if layers:
      chosen = values.layers(entry.get('layer_range'), where, report)
    name = model_names.read(entry['model'], 'model', report) or ''
    parameters = parameters_lib.read(
      entry.get('parameters'), method, f'parameters of {entry["model"]}',
      report, of_model=True,
    )  # fmt: skip
    inputs.append(Input(name, parameters, chosen))
  return tuple(inputs)


def _with_base(whole, method, parameters, report) -> Slice:
  """The only slice of `models:`, with a base that counts as a model."""
  base = whole.base
  if base is None or base in [source.model for source in whole.inputs]:
    return whole
  if method is None or method.name not in mergekit_words.READS:
    return whole
  if method.base_policy != 'ignored':
    return whole
  counts = method.name == 'karcher' or 'weight' in parameters
  if method.name in mergekit_words.TAKES_BASE_AS_MODEL and counts:
    report.remark(
      f'{method.name} takes {base}, the base, as one more model, as in mergekit'
    )
    return dataclasses.replace(whole, inputs=(*whole.inputs, Input(base, {})))
  report.remark(
    f'{method.name} has no use for a base: {base} gives its configuration and '
    'tokenizer, and is not merged'
  )
  return whole
