# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Public names of a package that load where they are first used.

What an editor and a type checker read of them stands in the stub beside the
package's `__init__.py`; a test compares the two.
"""

from collections.abc import Callable, Mapping
import difflib
import importlib
import sys
from typing import Any

# public name -> (module, attribute of it, or None for the module itself)
Names = Mapping[str, tuple[str, str | None]]


def attach(
  package: str, names: Names
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
  """What a package's `__init__.py` needs to offer names lazily.

  Args:
    package: its `__name__`.
    names: what it offers. A name that is also a module of the package must be
      that module: importing it anywhere sets the name.

  Returns:
    `(__getattr__, __dir__, __all__)`.

  Example:
    >>> __getattr__, _, names = attach('mergejax', {'pi': ('math', 'pi')})
    >>> names, round(__getattr__('pi'), 2)
    (['pi'], 3.14)
  """

  def load(name: str) -> Any:
    if name not in names:
      close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
      hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
      raise AttributeError(
        f'module {package!r} has no attribute {name!r}.{hint}'
      )
    module, attribute = names[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    if package in sys.modules:
      setattr(sys.modules[package], name, value)
    return value

  every = sorted(names)
  return load, lambda: list(every), every
