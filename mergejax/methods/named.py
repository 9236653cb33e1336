# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The menu: merge methods by the names that recipes use.

Every module of this folder is imported, so that what it defines is on it.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import pkgutil
from typing import Any

from mergejax import methods
from mergejax.core import errors
from mergejax.core import registry
from mergejax.methods import base
from mergejax.methods import entries

for _module in pkgutil.iter_modules(methods.__path__):
  if _module.name != 'named':
    importlib.import_module(f'{methods.__name__}.{_module.name}')

METHODS = entries.METHODS


@functools.lru_cache(256)
def _imported(
  name: str, constructor: Callable[..., Any]
) -> entries.MethodEntry:
  """The entry of a function; a module that is loaded again has others."""
  source = registry.source_digest(constructor)
  if source is None:
    raise errors.ConfigError(
      f'No file defines the {entries.WHAT} {name!r}, so results could not tell '
      'what they owe to it: write it as a function in a file.'
    )
  for known in map(METHODS.entry, METHODS):
    if known.constructor is constructor:
      return dataclasses.replace(known, name=name, source=source)
  try:
    registry.options_of(constructor, f'the {entries.WHAT} {name!r}')
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error
  return entries.MethodEntry(name, constructor, entries.WHAT, source=source)


def entry_of(method: Any) -> entries.MethodEntry:
  """The entry of a method.

  Args:
    method: a name of the menu; `package.module:function`, a constructor like
      those of the menu whose module is then imported; a built `Merge`; or an
      entry.

  Raises:
    ConfigError: no such name (near ones are offered), module or function.

  Example:
    >>> entry_of('mergejax.methods.mean:linear').options['normalize'].kind
    'flag'
  """
  if isinstance(method, entries.MethodEntry):
    return method
  if isinstance(method, base.Merge):
    return entries.MethodEntry(
      entries.VALUE,
      lambda: method,
      entries.WHAT,
      base=method.base,
      value=method,
    )
  if method not in METHODS and registry.is_import_path(method):
    return _imported(method, registry.imported(method, entries.WHAT))
  return METHODS.entry(method)


def resolve(method: str | base.Merge, **options: Any) -> base.Merge:
  """A method from its name and options, or the method itself.

  Args:
    method: a name of the menu, `package.module:function`, or a `Merge`.
    **options: of its constructor.

  Raises:
    ConfigError: unknown name or option (near ones are offered), a missing
      option, or options given beside a method that is already built.
  """
  return entry_of(method).build(**options)
