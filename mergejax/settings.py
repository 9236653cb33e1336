# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of recipes that differ along the layers and by name."""

from collections.abc import Sequence
import math
from typing import Any


def with_numbers(setting: Any) -> Any:
  """YAML reads `1e-5`, without a point, as text; here it is a number."""
  if isinstance(setting, str):
    try:
      return float(setting)
    except ValueError:
      return setting
  if isinstance(setting, list):
    return [with_numbers(one) for one in setting]
  if isinstance(setting, dict) and 'value' in setting:
    return {**setting, 'value': with_numbers(setting['value'])}
  return setting


def problem_of(setting: Any) -> str | None:
  """What is wrong with a setting, or None."""
  if isinstance(setting, dict):
    setting = [setting]
  if isinstance(setting, list):
    if not setting:
      return 'an empty list.'
    if all(isinstance(one, dict) for one in setting):
      for one in setting:
        if not set(one) <= {'filter', 'value'} or 'value' not in one:
          return f'expected `{{filter: TEXT, value: ...}}`, not {one}.'
        problem = problem_of(one['value'])
        if problem:
          return problem
      return None
    for one in setting:
      if type(one) not in (int, float):
        return f'a gradient is a list of numbers; {one!r} is not one.'
    return None
  if isinstance(setting, float) and not math.isfinite(setting):
    return f'must be finite, not {setting}.'
  if not isinstance(setting, (bool, int, float, str)):
    return f'must be a number, word or list, not {setting!r}.'
  return None


def evaluate(setting: Any, path: str, depth: float) -> Any:
  """The value that a setting has for one parameter.

  Args:
    setting: a plain value; a list of numbers spread evenly over the layers,
      between which it is linear; or a list of `{filter, value}`, of which the
      first whose filter is part of the path, '*' or absent counts.
    path: of the parameter.
    depth: 0 at the first layer, 1 at the last.

  Returns:
    The value, or None if no filter applies.

  Example:
    >>> evaluate([0, 1, 0], 'layers.3.mlp', 0.75)
    0.5
    >>> evaluate([{'filter': 'mlp', 'value': 1}, {'value': 2}], 'attn', 0.0)
    2
  """
  if isinstance(setting, dict):
    setting = [setting]
  if not isinstance(setting, (list, tuple)):
    return setting
  if isinstance(setting[0], dict):
    for one in setting:
      if one.get('filter') in (None, '*') or one['filter'] in path:
        return evaluate(one['value'], path, depth)
    return None
  return interpolate(setting, depth)


def interpolate(values: Sequence[float], depth: float) -> float:
  """Piecewise linear through evenly spread values."""
  at = depth * (len(values) - 1)
  low = min(int(at), len(values) - 1)
  high = min(low + 1, len(values) - 1)
  share = at - low
  return (1 - share) * values[low] + share * values[high]
