# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names that people write in recipes and commands, each with its constructor."""

from collections.abc import Callable, Iterator
import inspect
from typing import Any

from mergejax import errors


class Registry:
  """A small table of constructors by name.

  Registering a name twice is an error; looking up an unknown one suggests its
  neighbours; calling with an option the constructor lacks does the same.

  Example:
    >>> colours = Registry('colour')
    >>> @colours.register('red')
    ... def red(depth=1): return depth
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
      raise errors.UserError(errors.near(name, self._entries, self._what))
    return self._entries[name]

  def options(self, name: str) -> dict[str, inspect.Parameter]:
    """The keyword options of an entry, by name."""
    return dict(inspect.signature(self[name]).parameters)

  def build(self, name: str, **options) -> Any:
    """Calls the constructor `name` with `options`, which it must all know."""
    known = self.options(name)
    for option in options:
      if option not in known:
        raise errors.UserError(
          errors.near(option, known, f'option of {self._what} {name!r},')
          if known
          else f'The {self._what} {name!r} takes no option; {option!r} given.'
        )
    missing = [
      option
      for option, parameter in known.items()
      if parameter.default is parameter.empty and option not in options
    ]
    if missing:
      raise errors.UserError(
        f'The {self._what} {name!r} needs {", ".join(map(repr, missing))}, '
        'which has no default.'
      )
    return self[name](**options)
