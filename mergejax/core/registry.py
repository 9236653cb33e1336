# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names that people write in recipes and commands, each with its constructor."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import pathlib
import sys
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

  @property
  def static(self) -> bool:
    """True if a program is compiled for its value, which is no float."""
    return self.kind in ('flag', 'word', 'whole number')

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


def options_of(constructor: Callable[..., Any], what: str) -> dict[str, Option]:
  """The keyword options of a constructor, by name.

  Args:
    constructor: whose parameters are annotated `float`, `int`, `bool`, `str`,
      `Any` for a number that may differ by model, or not at all.
    what: the constructor, for messages.

  Raises:
    ValueError: another annotation.
  """
  result = {}
  for name, parameter in inspect.signature(constructor).parameters.items():
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
      continue
    if parameter.annotation not in _KINDS:
      raise ValueError(
        f'{name} of {what} is annotated {parameter.annotation!r}: use float, '
        'int, bool, str or Any.'
      )
    result[name] = Option(
      name,
      _KINDS[parameter.annotation],
      parameter.default,
      parameter.annotation is Any,
    )
  return result


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """A constructor, and what is known of it before it is called.

  Attributes:
    name: how recipes call it.
    constructor: called with options by name.
    what: what it makes, for messages: 'merge method'.
  """

  name: str
  constructor: Callable[..., Any]
  what: str

  @functools.cached_property
  def options(self) -> Mapping[str, Option]:
    """Its keyword options, by name."""
    return options_of(self.constructor, f'the {self.what} {self.name!r}')

  def build(self, **options: Any) -> Any:
    """Calls the constructor with options, which it must all know.

    Raises:
      ConfigError: an unknown option (near ones are offered), one that is
        missing, or one of another kind.
    """
    known = self.options
    for option in options:
      if option not in known:
        raise errors.ConfigError(
          errors.near(option, known, f'option of {self.what} {self.name!r},')
          if known
          else f'The {self.what} {self.name!r} takes no option; {option!r} '
          'given.'
        )
    missing = [
      option.name
      for option in known.values()
      if option.default is option.empty and option.name not in options
    ]
    if missing:
      raise errors.ConfigError(
        f'The {self.what} {self.name!r} needs '
        f'{", ".join(map(repr, missing))}, which has no default.'
      )
    for option, value in options.items():
      known[option].check(value, self.name)
    return self.constructor(**options)


class Registry:
  """A small table of entries by name.

  Registering a name twice is an error; looking up an unknown one suggests its
  neighbours; building with an option that the constructor lacks does the same.

  Example:
    >>> colours = Registry('colour')
    >>> @colours.register('red')
    ... def red(depth: int = 1): return depth
    >>> colours.build('red', depth=3)
    3
  """

  def __init__(self, what: str, kind: type[Entry] = Entry):
    """An empty table.

    Args:
      what: what its entries make, for messages.
      kind: the class of its entries, whose further fields are the traits that
        `register` takes.
    """
    self._what = what
    self._kind = kind
    self._entries: dict[str, Any] = {}

  def register(
    self, name: str, **traits: Any
  ) -> Callable[[Callable], Callable]:
    """Decorator that files a constructor under `name`, with its traits."""

    def add(constructor):
      if name in self._entries:
        raise ValueError(
          f'The {self._what} {name!r} is already registered by '
          f'{self._entries[name].constructor.__module__}.'
        )
      self._entries[name] = self._kind(name, constructor, self._what, **traits)
      return constructor

    return add

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._entries))

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def entry(self, name: str) -> Any:
    """What is known of a name.

    Raises:
      ConfigError: it is not registered; near names are offered.
    """
    if name not in self._entries:
      raise errors.ConfigError(errors.near(name, self._entries, self._what))
    return self._entries[name]

  def __getitem__(self, name: str) -> Callable[..., Any]:
    return self.entry(name).constructor

  def options(self, name: str) -> Mapping[str, Option]:
    """The keyword options of an entry, by name."""
    return self.entry(name).options

  def build(self, name: str, **options: Any) -> Any:
    """Calls the constructor `name` with `options`; see `Entry.build`."""
    return self.entry(name).build(**options)


def is_import_path(name: Any) -> bool:
  """Whether a name says where a function stands: `package.module:function`.

  Example:
    >>> is_import_path('my_merge:shrink'), is_import_path('ties')
    (True, False)
  """
  parts = str(name).split(':')
  return len(parts) == 2 and all(
    part.isidentifier() for part in (*parts[0].split('.'), parts[1])
  )


def imported(name: str, what: str) -> Callable[..., Any]:
  """The function that `package.module:function` names.

  Modules of the folder in which the program was started are found too, as with
  `python -m`.

  Raises:
    ConfigError: there is no such module (or something that it needs is not
      installed), or no such function in it.
  """
  module_name, _, function = name.partition(':')
  if os.getcwd() not in sys.path and '' not in sys.path:
    sys.path.append(os.getcwd())
  try:
    module = importlib.import_module(module_name)
  except ImportError as error:
    raise errors.ConfigError(
      f'The {what} {name!r} cannot be imported: {error}. Install its package, '
      'start in the folder of its file, or name that folder in PYTHONPATH.'
    ) from error
  found = getattr(module, function, None)
  if not callable(found):
    public = [n for n in vars(module) if not n.startswith('_')]
    raise errors.ConfigError(
      errors.near(function, public, f'{what} in {module_name},')
    )
  return found


def source_digest(function: Callable[..., Any]) -> str | None:
  """sha256 of the file that defines a function, 64 hexadecimal digits.

  Args:
    function: a function, class, `functools.partial` or callable object.

  Returns:
    None where no file defines it.
  """
  found = inspect.unwrap(function)
  while isinstance(found, functools.partial):
    found = inspect.unwrap(found.func)
  if not (inspect.isroutine(found) or inspect.isclass(found)):
    found = type(found)
  try:
    file = inspect.getsourcefile(found)
  except TypeError:  # it is built in
    file = None
  if file is None or not os.path.isfile(file):
    return None
  return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
