# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Settings of recipes: of a kind, along the layers, and by name."""

from collections.abc import Callable, Sequence
import math
from typing import Any

_TRUE = ('1', 'on', 't', 'true', 'y', 'yes')
_FALSE = ('0', 'off', 'f', 'false', 'n', 'no')


def read(
  setting: Any, kind: str = 'number', convert: Callable | None = None
) -> tuple[Any, str | None]:
  """A setting with every value in it of one kind, as mergekit converts them.

  Text that is a number is that number (YAML takes `1e-5` for text), `1.0` and
  `'true'` are flags, `10.0` is a whole number. What has no meaning is told.

  Args:
    setting: as YAML gave it: a value, a gradient `[0, 0.5, 1]`, or filters
      `[{filter: TEXT, value: ...}, ...]`.
    kind: of an option, see `registry.Option`.
    convert: what reads one value, raising `ValueError` with the problem; by
      default that of the kind.

  Returns:
    `(setting, None)`, or `(None, what is wrong)`.

  Example:
    >>> read(['0.5', 1], 'number')
    ([0.5, 1], None)
    >>> read('false', 'flag')
    (False, None)
    >>> read('half', 'number')
    (None, "must be a number, not 'half'.")
  """
  convert = convert or _CONVERSIONS[kind]
  try:
    return _read(setting, kind, convert), None
  except ValueError as error:
    return None, str(error)


def _read(setting, kind, convert):
  if isinstance(setting, dict):
    setting = [setting]
  if not isinstance(setting, list):
    return convert(setting)
  if not setting:
    raise ValueError('an empty list.')
  if all(isinstance(one, dict) for one in setting):
    for one in setting:
      plain = isinstance(one.get('filter'), (str, type(None)))
      if 'value' not in one or not set(one) <= {'filter', 'value'} or not plain:
        raise ValueError(f'expected `{{filter: TEXT, value: ...}}`, not {one}.')
      if isinstance(one['value'], dict):
        raise ValueError(f'a filter inside a filter: {one}.')
    return [
      {**one, 'value': _read(one['value'], kind, convert)} for one in setting
    ]
  if kind == 'whole number' and len(setting) > 1:
    raise ValueError(
      f'must be one whole number; a gradient {setting} has fractions in it.'
    )
  result = []
  for one in setting:
    try:
      result.append(convert(one))
    except ValueError as error:
      raise ValueError(
        f'a gradient is a list of {kind}s; {one!r} is not one.'
      ) from error
  return result


def number(value: Any) -> float:
  """A finite number; raises `ValueError` with what is wrong."""
  if isinstance(value, str):
    try:
      value = float(value)
    except ValueError:
      pass
  if isinstance(value, bool):
    value = float(value)
  if not isinstance(value, (int, float)):
    raise ValueError(f'must be a number, not {value!r}.')
  if not math.isfinite(value):
    raise ValueError(f'must be finite, not {value}.')
  return value


def whole_number(value: Any) -> int:
  """A number without fraction; raises `ValueError` with what is wrong."""
  try:
    found = number(value)
  except ValueError:
    found = None
  if found is None or found != int(found):
    raise ValueError(f'must be a whole number, not {value!r}.')
  return int(found)


def flag(value: Any) -> bool:
  """True or false; raises `ValueError` with what is wrong.

  1, 1.0, 'true', 'yes', 'on', 'y', 't' and '1' are true, their opposites
  false, whatever their case.
  """
  word = value.lower() if isinstance(value, str) else value
  # Of equal values: True == 1 == 1.0, but '1' is none of them.
  for meaning, words in ((True, (*_TRUE, 1)), (False, (*_FALSE, 0))):
    if word in words:
      return meaning
  raise ValueError(f'must be true or false, not {value!r}.')


def word(value: Any) -> str:
  """Text; raises `ValueError` with what is wrong."""
  if not isinstance(value, str):
    raise ValueError(f'must be a word, not {value!r}.')
  return value


_CONVERSIONS = {
  'number': number,
  'whole number': whole_number,
  'flag': flag,
  'word': word,
  'value': lambda value: value,
}


def evaluate(setting: Any, path: str, depth: float) -> Any:
  """The value that a setting has for one parameter.

  Args:
    setting: a plain value; a list of numbers spread evenly over the layers,
      between which it is linear (of words and flags, the last one reached
      counts); or a list of `{filter, value}`, of which the first whose filter
      is part of the path, '*' or absent counts.
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
  if isinstance(setting[0], (bool, str)):
    return setting[int(depth * (len(setting) - 1))]
  return interpolate(setting, depth)


def is_gradient(setting: Any) -> bool:
  """True if a setting changes along the layers, under some filter or all."""
  if not isinstance(setting, (list, tuple)):
    return False
  if isinstance(setting[0], dict):
    return any(is_gradient(one['value']) for one in setting)
  return len(set(setting)) > 1


def interpolate(values: Sequence[float], depth: float) -> float:
  """Piecewise linear through evenly spread values."""
  at = depth * (len(values) - 1)
  low = min(int(at), len(values) - 1)
  high = min(low + 1, len(values) - 1)
  share = at - low
  return (1 - share) * values[low] + share * values[high]
