# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Public names of a package that load where they are first used.

The stub beside a package's `__init__.py` is the only table of them: an editor,
a type checker and `attach` read the same lines.
"""

from collections.abc import Callable
import difflib
import importlib
import pathlib
import re
import sys
from typing import Any

_IMPORT = re.compile(r'^from (\S+) import (\w+)(?: as (\w+))?$', re.MULTILINE)


def attach(
  package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
  """What a package's `__init__.py` needs to offer the names of its stub.

  The stub imports each name on a line of its own, from the module that defines
  it. A name that is also a module of the package must be that module: importing
  it anywhere sets the name.

  Args:
    package: its `__name__`.
    file: its `__file__`; the stub is `__init__.pyi` in the same folder.

  Returns:
    `(__getattr__, __dir__, __all__)`.

  Example:
    >>> import mergejax
    >>> __getattr__, _, names = attach('mergejax', mergejax.__file__)
    >>> 'ties' in names, __getattr__('ties').__module__
    (True, 'mergejax.methods.ties')
  """
  stub = pathlib.Path(file).with_suffix('.pyi').read_text(encoding='utf-8')
  places = {
    alias or name: (module, name)
    for module, name, alias in _IMPORT.findall(stub)
  }

  def load(name: str) -> Any:
    if name not in places:
      close = difflib.get_close_matches(name, places, n=3, cutoff=0.6)
      hint = f' Did you mean {" or ".join(map(repr, close))}?' if close else ''
      raise AttributeError(
        f'module {package!r} has no attribute {name!r}.{hint}'
      )
    module, attribute = places[name]
    if module == package:
      value = importlib.import_module(f'{module}.{attribute}')
    else:
      value = getattr(importlib.import_module(module), attribute)
    setattr(sys.modules[package], name, value)
    return value

  public = sorted(places)
  return load, lambda: list(public), public
