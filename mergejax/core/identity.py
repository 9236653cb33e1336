# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether what lies on the disk is a part of the same work.

Merges, statistics, searches and training runs write down what they have done
and continue from there. Each states its work as plain data: what was asked
for, and of what. Two statements are the same work if their canonical forms are
equal, in any process, whatever the order in which dicts were filled; and if
the code that computes is the same, or the bits might differ.
"""

from collections.abc import Mapping
import dataclasses
import datetime
import functools
import hashlib
from importlib import metadata
import inspect
import json
import os
import pathlib
import re
import types
from typing import Any

import numpy as np

from mergejax.core import errors

# What computes beside this package; a new version may round otherwise.
_LIBRARIES = ('jax', 'jaxlib', 'numpy')


def canonical(value: Any) -> Any:
  """The plain form of a value: what JSON gives back, keys in order.

  Args:
    value: numbers, texts, paths, dates, dtypes, arrays, dataclasses, mappings,
      sequences and sets of these.

  Returns:
    None, bools, numbers, texts, lists, and dicts with sorted text keys. Sets
    become sorted lists; arrays their dtype, shape and sha256.

  Raises:
    TypeError: anything else: the text of an object may hold its address, which
      no other process has.

  Example:
    >>> canonical({'b': {2, 1}, 'a': np.float32(0.5)})
    {'a': 0.5, 'b': [1, 2]}
  """
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, np.generic) and value.dtype.kind in 'biufU':
    return value.item()
  if isinstance(value, (os.PathLike, datetime.date)):
    return str(value)
  if isinstance(value, np.dtype):
    return value.name
  if isinstance(value, np.ndarray):
    data = np.ascontiguousarray(value).tobytes()
    shape, dtype = list(value.shape), value.dtype.name
    return {
      'dtype': dtype,
      'sha256': hashlib.sha256(data).hexdigest(),
      'shape': shape,
    }
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    return canonical({f.name: getattr(value, f.name) for f in fields})
  if isinstance(value, Mapping):
    plain = {str(key): canonical(one) for key, one in value.items()}
    return dict(sorted(plain.items()))
  if isinstance(value, (list, tuple)):
    return [canonical(one) for one in value]
  if isinstance(value, (set, frozenset)):
    return sorted((canonical(one) for one in value), key=to_text)
  raise TypeError(f'{type(value).__name__} has no canonical form: {value!r}')


def told(value: Any) -> Any:
  """What something is made of, functions included, as plain data.

  A function is its name and whatever it closes over or has for defaults, so that
  a merge method, which is functions around its options, tells these. Of a
  lambda the numbers in it count too. What else there is, such as an object of
  another library, is its text without an address.

  Example:
    >>> def scaled(by):
    ...   return lambda x: by * x
    >>> told(scaled(2.0))['by'], told(scaled(2.0)) == told(scaled(3.0))
    (2.0, False)
  """
  return _told(value, ())


def _told(value, within):
  if any(value is one for one in within):
    return 'itself'
  try:
    return canonical(value)
  except TypeError:
    pass
  parts = _parts(value)
  if parts is None:
    # Objects that say nothing of themselves say where they lie in memory.
    return re.sub(r' at 0x[0-9a-f]+', '', repr(value))
  name, parts = parts
  found = {str(n): _told(one, (*within, value)) for n, one in parts.items()}
  if name is None:
    return found
  return {'function': name, **found} if found else name


def _parts(value) -> tuple[str | None, Mapping[Any, Any]] | None:
  """`(name of a function, what it is made of)`; None: nothing that is known."""
  if isinstance(value, functools.partial):
    given = dict(enumerate(value.args)) | value.keywords
    return 'partial', {'of': value.func, **given}
  if isinstance(value, types.MethodType):
    return value.__qualname__, {'self': value.__self__}
  if isinstance(value, types.FunctionType):
    return f'{value.__module__}.{value.__qualname__}', _held(value)
  if hasattr(value, '__wrapped__'):  # by jit, or a decorator
    return 'wrapped', {'of': value.__wrapped__}
  if isinstance(value, Mapping):
    return None, value
  if isinstance(value, (list, tuple)):
    names = getattr(value, '_fields', range(len(value)))
    return None, dict(zip(names, value))
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    fields = dataclasses.fields(value)
    return type(value).__qualname__, {
      field.name: getattr(value, field.name) for field in fields
    }
  if isinstance(value, type) or inspect.isbuiltin(value):
    return value.__qualname__, {}
  if hasattr(value, '__array__') and not callable(value):
    return None, {'array': np.asarray(value)}
  return None


def _held(function: types.FunctionType) -> dict[Any, Any]:
  """What a function closes over, its defaults, the numbers of a lambda."""
  code = function.__code__
  held: dict[Any, Any] = dict(enumerate(function.__defaults__ or ()))
  held |= function.__kwdefaults__ or {}
  for name, cell in zip(code.co_freevars, function.__closure__ or ()):
    try:
      held[name] = cell.cell_contents
    except ValueError:  # what is not bound yet
      held[name] = None
  if function.__name__ == '<lambda>':
    numbers = [c for c in code.co_consts if isinstance(c, (int, float))]
    if numbers:
      held['numbers'] = numbers
  return held


def to_text(value: Any) -> str:
  """The canonical form as one line of JSON."""
  return json.dumps(canonical(value), ensure_ascii=False, sort_keys=True)


def digest(value: Any) -> str:
  """sha256 of the canonical form, 64 hexadecimal digits."""
  return hashlib.sha256(to_text(value).encode()).hexdigest()


@functools.cache
def code() -> Mapping[str, str]:
  """The code that computes: `{'mergejax': sha256 of its source, 'jax': ...}`.

  The source rather than the release: work that was begun before a fault was
  mended is not continued after it.
  """
  package = pathlib.Path(__file__).resolve().parent.parent
  source = hashlib.sha256()
  for file in sorted(package.rglob('*.py')):
    data = file.read_bytes()
    source.update(f'{file.relative_to(package)} {len(data)}\n'.encode())
    source.update(data)
  return {
    'mergejax': source.hexdigest(),
    **{name: metadata.version(name) for name in _LIBRARIES},
  }


def record(work: Mapping[str, Any]) -> dict[str, Any]:
  """What a journal keeps to know its work again: `{'code': ..., 'work': ...}`."""
  return canonical({'work': work, 'code': code()})


def check_same(
  found: Any, wanted: Mapping[str, Any], path: os.PathLike | str
) -> None:
  """Refuses to continue other work.

  Args:
    found: the `record` that a journal holds.
    wanted: the `record` of the work at hand.
    path: of the journal.

  Raises:
    UserError: they differ; it lists how.
  """
  if found == wanted:
    return
  if not isinstance(found, Mapping) or {*found} != {'work', 'code'}:
    found = {'work': {}, 'code': {}}
  lines = errors.differences(found['work'], wanted['work'])
  if lines:
    reason = f'was begun with other settings:\n{errors.listed(lines, 12)}\n'
  else:
    lines = errors.differences(found['code'], wanted['code'])
    reason = (
      'was begun by another version of the code, which may round otherwise:\n'
      f'{errors.listed(lines)}\n'
    )
  raise errors.ConfigError(
    f'{path} {reason}Remove it to start afresh, or choose another place.'
  )
