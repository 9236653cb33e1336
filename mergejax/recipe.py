# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: which models, which weights, which method, as data.

A recipe is a YAML file with mergekit's keys:

    merge_method: task_arithmetic
    base_model: path/to/seed
    models:
      - model: path/to/expert_a
        parameters: {weight: 1.0}
      - model: path/to/expert_b
    parameters: {lambda: 0.4}
    out_dtype: float32
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import yaml

from mergejax import errors
from mergejax.merging import named

_KEYS = (
    'merge_method', 'models', 'base_model', 'parameters', 'out_dtype', 'dtype',
    'seed', 'format',
)  # fmt: skip
_DTYPES = ('float32', 'bfloat16', 'float16')
# Recipe names of options whose Python name is another word.
_RENAMED = {'lambda': 'scale'}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A checked recipe.

  Attributes:
    method: name on the menu.
    models: paths of the models.
    weights: one coefficient a model, or None for the method's default.
    base: path of the base model, or None.
    options: options of the method, by their Python names.
    dtype: dtype of the result, or None for that of the base or first model.
    seed: seed of random methods.
    format: format of the result, or None for what the name of OUT says.
  """

  method: str
  models: tuple[str, ...]
  weights: tuple[float, ...] | None = None
  base: str | None = None
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dtype: str | None = None
  seed: int = 0
  format: str | None = None


def load_recipe(path: os.PathLike | str) -> Recipe:
  """Reads and checks a recipe file.

  Args:
    path: a YAML file; see the module for an example.

  Returns:
    The recipe. Method and options exist; no checkpoint has been looked at.

  Raises:
    UserError: the file is missing or not YAML, or something in it is not
      known (near names are offered).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(f'There is no recipe at {path}.')
  try:
    data = yaml.safe_load(path.read_text(encoding='utf-8'))
  except yaml.YAMLError as error:
    raise errors.UserError(f'{path} is not YAML: {error}') from error
  try:
    return parse_recipe(data)
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error}') from error


def parse_recipe(data: Any) -> Recipe:
  """Checks a recipe given as nested dicts and lists; see `load_recipe`."""
  _check_mapping(data, _KEYS, 'recipe')
  for key in ('merge_method', 'models'):
    if not data.get(key):
      raise errors.UserError(f'The recipe lacks {key!r}.')
  if not isinstance(data['models'], list):
    raise errors.UserError("'models' must be a list of `- model: PATH`.")
  method = str(data['merge_method'])
  models, weights = [], []
  for i, entry in enumerate(data['models']):
    entry = {'model': entry} if isinstance(entry, str) else entry
    _check_mapping(entry, ('model', 'parameters'), f'entry {i} of models')
    if 'model' not in entry:
      raise errors.UserError(f"Entry {i} of models lacks 'model'.")
    own = entry.get('parameters') or {}
    _check_mapping(own, ('weight',), f'parameters of {entry["model"]}')
    models.append(str(entry['model']))
    weights.append(own.get('weight'))
  options = {}
  shared = data.get('parameters') or {}
  _check_mapping(shared, None, 'parameters')
  for key, value in shared.items():
    if key == 'weight':
      weights = [value if weight is None else weight for weight in weights]
    else:
      options[_RENAMED.get(key, key)] = value
  named.resolve(method, **options)  # unknown names fail here
  dtype = data.get('out_dtype') or data.get('dtype')
  if dtype is not None and dtype not in _DTYPES:
    raise errors.UserError(errors.near(str(dtype), _DTYPES, 'dtype'))
  given = [weight is not None for weight in weights]
  if any(given) and not all(given):
    raise errors.UserError('Give every model a weight, or none of them.')
  return Recipe(
    method=method,
    models=tuple(models),
    weights=_numbers(weights) if all(given) else None,
    base=data.get('base_model'),
    options=options,
    dtype=dtype,
    seed=int(data.get('seed', 0)),
    format=data.get('format'),
  )


def _numbers(values):
  for value in values:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise errors.UserError(f'A weight must be one number, not {value!r}.')
    if not np.isfinite(value):
      raise errors.UserError(f'A weight must be finite, not {value}.')
  return tuple(float(value) for value in values)


def _check_mapping(data, known, what):
  if not isinstance(data, dict):
    raise errors.UserError(f'The {what} must be `key: value` lines.')
  for key in data:
    if known is not None and key not in known:
      raise errors.UserError(
        errors.near(str(key), known, f'key of the {what},')
      )
