# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Messages that teach: near names, lists of differences, what to do next."""

from collections.abc import Iterable, Mapping, Sequence
import difflib
import math
import numbers
import os
from typing import Any


class UserError(ValueError):
  """A mistake in what was asked for; the command line prints only its text.

  The message says what was expected, what came, which parameter and which
  file, and what to do next. `mergejax` exits with code 2 on it.
  """

  def __init__(self, message: str):
    super().__init__(message)
    # Kept apart from str(), to which gin adds a trail of configurables.
    self.message = message

  def at(self, where: object) -> 'UserError':
    """The same mistake, of the same kind, with where it was made before it.

    Example:
      >>> DataError('There is no row.').at('a.tsv')
      DataError('a.tsv: There is no row.')
    """
    return type(self)(f'{where}: {self.message}')


class RecipeError(UserError):
  """A recipe, or a plan of it, asks for what cannot be done."""


class CheckpointError(UserError):
  """A file of weights, or what lies beside it, is not what it should be."""


class StructureError(UserError):
  """Parameters do not fit each other: other names, shapes, axes or layers."""


class ConfigError(UserError):
  """A setting, an option, a flag or a gin file has a value it cannot have."""


class DataError(UserError):
  """Text, images, batches or statistics are not what they should be."""


class Stopped(Exception):
  """The process was asked to stop (SIGTERM); the run is saved."""


def near(name: str, known: Iterable[str], what: str) -> str:
  """Sentence for an unknown name, with the nearest known ones.

  Args:
    name: what the user wrote.
    known: the valid names.
    what: the kind of thing: `'merge method'`.

  Returns:
    A sentence to raise as a `UserError`.

  Example:
    >>> near('liner', ['linear', 'ties'], 'merge method')
    "Unknown merge method 'liner'. Did you mean 'linear'? Known: linear, ties."
  """
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
  hint = ''
  if close:
    hint = ' Did you mean ' + ' or '.join(repr(c) for c in close) + '?'
  listing = f'Known: {", ".join(known)}.' if known else 'None is known here.'
  return f'Unknown {what} {name!r}.{hint} {listing}'


def listed(lines: Sequence[str], limit: int = 10) -> str:
  """Joins lines into an indented list of at most `limit`, counting the rest."""
  shown = [f'  {line}' for line in lines[:limit]]
  if len(lines) > limit:
    shown.append(f'  ... and {len(lines) - limit} more')
  return '\n'.join(shown)


def check_whole(name: str, number: Any, least: int = 1) -> None:
  """Raises a `ConfigError` for what is no whole number of `least` or more.

  Args:
    name: of the setting.
    number: its value.
    least: the smallest that it may have.
  """
  whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
  if not whole or number < least:
    raise ConfigError(
      f'{name} must be a whole number of {least} or more, not {number!r}.'
    )


def check_bool(name: str, value: Any) -> None:
  """Raises a `ConfigError` for what is neither True nor False.

  Args:
    name: of the setting.
    value: what it is set to.
  """
  if not isinstance(value, bool):
    raise ConfigError(f'{name} must be true or false, not {value!r}.')


def check_number(
  name: str,
  number: Any,
  least: float,
  most: float = math.inf,
  *,
  open_below: bool = False,
) -> None:
  """Raises a `ConfigError` for what is no number from `least` to `most`.

  Args:
    name: of the setting.
    number: its value.
    least: the smallest that it may have.
    most: the largest; any finite number by default.
    open_below: `least` itself is too small.
  """
  real = isinstance(number, numbers.Real) and not isinstance(number, bool)
  value = float(number) if real else math.nan
  fits = least <= value <= most and math.isfinite(value)
  if not fits or (open_below and number == least):
    low = f'above {least}' if open_below else f'of {least} or more'
    high = f' and {most} at most' if math.isfinite(most) else ''
    raise ConfigError(f'{name} must be a number {low}{high}, not {number!r}.')


def some(names: Sequence[str], limit: int = 3) -> str:
  """Joins a few names, counting the rest.

  Example:
    >>> some(['a', 'b', 'c', 'd', 'e'])
    'a, b, c and 2 more'
  """
  more = f' and {len(names) - limit} more' if len(names) > limit else ''
  return ', '.join(names[:limit]) + more


def first_line(error: BaseException) -> str:
  """What another library says, cut to one line; its kind if it says nothing.

  Example:
    >>> first_line(OSError("No room.\\nAt 0x1")), first_line(ValueError())
    ('No room.', 'ValueError')
  """
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def differences(
  there: Mapping[str, Any], asked: Mapping[str, Any]
) -> list[str]:
  """Lines that say which settings differ, those inside of settings too.

  Args:
    there: what a run or a file was made with.
    asked: what is asked for now.

  Returns:
    One line a setting, by name.

  Example:
    >>> differences({'seed': 0, 'size': {'a': 1}}, {'seed': 0, 'size': {'a': 2}})
    ['size/a: 1 there, 2 asked for']
  """
  lines = []
  for name in sorted({**there, **asked}):
    old, new = there.get(name), asked.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      lines += [f'{name}/{line}' for line in differences(old, new)]
    elif old != new:
      texts = str(old), str(new)
      # Of long ones that begin alike, the end of what is alike and the rest.
      start = max(0, len(os.path.commonprefix(texts)) - 20)
      old, new = (_short(text, start) for text in texts)
      lines.append(f'{name}: {old} there, {new} asked for')
  return lines


def _short(text, start):
  if len(text) > 60 and start:
    text = f'...{text[start:]}'
  return text if len(text) <= 60 else f'{text[:57]}...'
