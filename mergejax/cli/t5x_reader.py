# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""gin files read as data: nothing that they name is imported or called."""

from collections.abc import Sequence
import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

from gin import config_parser
from mergejax.cli import common
from mergejax.core import errors


class Reference(NamedTuple):
  """`@scope/module.Name`, with `()` if it is evaluated."""

  name: str
  evaluated: bool

  def __str__(self):
    scope, _, selector = self.name.rpartition('/')
    name = selector.split('.')[-1] + ('()' if self.evaluated else '')
    return f'@{scope}/{name}' if scope else f'@{name}'


class Macro(NamedTuple):
  """`%name`."""

  name: str


REQUIRED = Macro('gin.REQUIRED')


class _Delegate(config_parser.ParserDelegate):
  """Keeps references as text."""

  def configurable_reference(self, name, evaluate):
    return Reference(name, evaluate)

  def macro(self, name):
    return Macro(name)


# `models.EncoderDecoderModel.predict_batch` without its modules.
_CONFIGURABLE = re.compile(r'([A-Z]\w*\.)?\w+$')


def text_of(
  file: str, search_paths: Sequence[str] = (), named_by: str | None = None
) -> str | None:
  """The text of a gin file.

  Args:
    file: looked for as it is, below `search_paths`, beside an installed T5X and
      among ours.
    search_paths: folders.
    named_by: who names it, for the error; None: no error.

  Returns:
    None if there is no such file and `named_by` is None.

  Raises:
    ConfigError: there is no such file.
  """
  found = importlib.util.find_spec('t5x')
  inside = found.submodule_search_locations if found else None
  beside = [pathlib.Path(folder).parent for folder in inside or ()]
  for folder in ('', *search_paths, *beside, common.gin_folder()):
    path = pathlib.Path(folder) / file
    if path.is_file():
      return path.read_text()
  if named_by is None:
    return None
  raise errors.ConfigError(
    f"There is no gin file {file}, which {named_by} names. T5X's own files are "
    'no part of this package: name the folder that holds "t5x/" with '
    '--gin_search_paths=FOLDER.'
  )


class Reader:
  """What gin files say; the last binding of a name wins, and comes last.

  Attributes:
    macros: `{name: value}`.
    bindings: `{(scope, configurable without modules, argument): value}`.
    modules: that are imported, in order.
  """

  def __init__(self, search_paths: Sequence[str] = ()):
    self._search_paths = search_paths
    self.macros: dict[str, Any] = {}
    self.bindings: dict[tuple[str, str, str], Any] = {}
    self.modules: dict[str, None] = {}

  def add_file(self, file: str, named_by: str = 'the command line') -> None:
    """Adds what a file and those that it includes say.

    Raises:
      ConfigError: a file that is missing, or no gin.
    """
    self.add_text(text_of(file, self._search_paths, named_by), file)

  def add_text(self, text: str, name: str) -> None:
    """Adds what a text says; `name` is for errors, see `add_file`."""
    try:
      for statement in config_parser.ConfigParser(text, _Delegate()):
        self._add(statement, name)
    except errors.UserError:
      raise
    except (SyntaxError, ValueError) as error:
      words = ' '.join(str(error).split())
      raise errors.ConfigError(f'gin, {name}: {words}') from error

  def _add(self, statement, name):
    if isinstance(statement, config_parser.ImportStatement):
      self.modules.pop(statement.module, None)
      self.modules[statement.module] = None
    elif isinstance(statement, config_parser.IncludeStatement):
      self.add_file(statement.filename, name)
    elif isinstance(statement, config_parser.BindingStatement):
      if not statement.arg_name:
        self.macros[statement.selector] = statement.value
        return
      configurable = _CONFIGURABLE.search(statement.selector)[0]
      key = statement.scope, configurable, statement.arg_name
      self.bindings.pop(key, None)
      self.bindings[key] = statement.value

  def resolved(self, value: Any, seen: tuple[str, ...] = ()) -> Any:
    """A value without macros; one that must be set stays the macro it is.

    Raises:
      ConfigError: a macro that nothing defines.
    """
    if isinstance(value, Macro) and value != REQUIRED:
      if value.name in seen or value.name not in self.macros:
        raise errors.ConfigError(
          errors.near(value.name, self.macros, 'gin name')
        )
      found = self.resolved(self.macros[value.name], (*seen, value.name))
      return value if found == REQUIRED else found
    if isinstance(value, (Reference, Macro)):
      return value
    if isinstance(value, dict):
      return {k: self.resolved(v, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return type(value)(self.resolved(each, seen) for each in value)
    return value
