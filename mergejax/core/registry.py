# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names that people write in recipes and commands, each with its constructor."""

from collections.abc import Callable, Iterator
import dataclasses
import inspect
from typing import Any, ClassVar

import numpy as np

from mergejax.core import errors

# What an option is annotated with, and the kind that it therefore has.
_KINDS = {
  float: 'number',
  int: 'whole number',
  bool: 'flag',
  str: 'word',
  Any: 'number',  # one for all, or a list of one a model
  inspect.Parameter.empty: 'value',  # not annotated: anything
}


@dataclasses.dataclass(frozen=True)
class Option:
  """One keyword of a constructor.

  Attributes:
    name: the keyword.
    kind: 'number', 'whole number', 'flag' or 'word', from the annotation.
    default: its default; `empty` if it must be given.
    per_model: annotated `Any`: the models may differ in it.
  """

  empty: ClassVar[Any] = inspect.Parameter.empty

  name: str
  kind: str
  default: Any = inspect.Parameter.empty
  per_model: bool = False

  def check(self, value: Any, what: str) -> None:
    """Raises `UserError` unless a flag, word or whole number is one.

    Numbers may be traced by JAX; constructors check their ranges.
    """
    wanted, good = {
      'flag': ('true or false', isinstance(value, (bool, np.bool_))),
      'word': ('a word', isinstance(value, str)),
      'whole number': (
        'a whole number',
        isinstance(value, (int, np.integer)) and not isinstance(value, bool),
      ),
      'number': ('a number', not isinstance(value, (str, type(None)))),
      'value': ('', True),
    }[self.kind]
    if not good:
      raise errors.ConfigError(
        f'{self.name} of {what} must be {wanted}, not {value!r}.'
      )

  def __str__(self) -> str:
    kind = f'{self.kind}, per model' if self.per_model else self.kind
    needed = self.default is self.empty
    return f'{self.name}: {kind}' + ('' if needed else f' = {self.default!r}')


class Registry:
  """A small table of constructors by name.

  An option is annotated `float`, `int`, `bool`, `str`, or `Any` for a number
  that may differ by model; that is the kind it is checked against.

  Registering a name twice is an error; looking up an unknown one suggests its
  neighbours; calling with an option the constructor lacks does the same.

  Example:
    >>> colours = Registry('colour')
    >>> @colours.register('red')
    ... def red(depth: int = 1): return depth
    >>> colours.build('red', depth=3)
    3
  """

  def __init__(self, what: str):
    self._what = what
    self._entries: dict[str, Callable[..., Any]] = {}

  def register(self, name: str) -> Callable[[Callable], Callable]:
    """Decorator that files a constructor under `name`."""

    def add(constructor):
      if name in self._entries:
        raise ValueError(
          f'The {self._what} {name!r} is already registered by '
          f'{self._entries[name].__module__}.'
        )
      self._entries[name] = constructor
      return constructor

    return add

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._entries))

  def __getitem__(self, name: str) -> Callable[..., Any]:
    if name not in self._entries:
      raise errors.ConfigError(errors.near(name, self._entries, self._what))
    return self._entries[name]

  def options(self, name: str) -> dict[str, Option]:
    """The keyword options of an entry, by name."""
    result = {}
    for option, parameter in inspect.signature(self[name]).parameters.items():
      if parameter.annotation not in _KINDS:
        raise ValueError(
          f'{option} of the {self._what} {name!r} is annotated '
          f'{parameter.annotation!r}: use float, int, bool, str or Any.'
        )
      result[option] = Option(
        option, _KINDS[parameter.annotation], parameter.default,
        parameter.annotation is Any,
      )  # fmt: skip
    return result

  def build(self, name: str, **options) -> Any:
    """Calls the constructor `name` with `options`, which it must all know."""
    known = self.options(name)
    for option in options:
      if option not in known:
        raise errors.ConfigError(
          errors.near(option, known, f'option of {self._what} {name!r},')
          if known
          else f'The {self._what} {name!r} takes no option; {option!r} given.'
        )
    missing = [
      option.name
      for option in known.values()
      if option.default is option.empty and option.name not in options
    ]
    if missing:
      raise errors.ConfigError(
        f'The {self._what} {name!r} needs {", ".join(map(repr, missing))}, '
        'which has no default.'
      )
    for option, value in options.items():
      known[option].check(value, name)
    return self[name](**options)
