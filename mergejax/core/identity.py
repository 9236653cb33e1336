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
import json
import os
import pathlib
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
