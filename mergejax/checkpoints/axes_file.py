# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Logical axes of parameters, stored beside them.

A directory holds `axes.json`, `{path: [names]}`; a single safetensors file has
the same text in its metadata. Other programs pass over both.
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from mergejax.checkpoints import base
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import typing

NAME = 'axes.json'
# Key of the metadata of a safetensors file.
KEY = 'axes'


def text(axes: Mapping[typing.Path, Any]) -> str:
  """`{path: names}` as JSON, one parameter a line."""
  lines = [
    f'{json.dumps(path)}: {json.dumps(list(names))}'
    for path, names in axes.items()
  ]
  return '{\n' + ',\n'.join(lines) + '\n}\n'


def parse(written: str, source: str) -> dict[typing.Path, tuple[str, ...]]:
  """What `text` has written.

  Args:
    written: the text.
    source: where it is from, for messages.

  Raises:
    CheckpointError: it is not that.
  """
  try:
    data = json.loads(written)
    good = isinstance(data, dict) and all(
      isinstance(names, list) and all(isinstance(n, str) for n in names)
      for names in data.values()
    )
  except ValueError:
    good = False
  if not good:
    raise errors.CheckpointError(
      f'{source} should hold a JSON object {{parameter: [one name an axis]}}. '
      'Restore it, or remove it and give the axes where they are needed.'
    )
  return {path: tuple(names) for path, names in data.items()}


def find(path: pathlib.Path) -> dict[typing.Path, tuple[str, ...]]:
  """The axes stored in a directory; none if it has no such file."""
  file = path / NAME
  if not file.is_file():
    return {}
  return parse(file.read_text(encoding='utf-8'), str(file))


def attach(
  store: base.ParamStore, axes: Mapping[typing.Path, tuple[str, ...]]
) -> base.ParamStore:
  """Names the axes of a store's leaves.

  Args:
    store: just opened; its specs are changed in place. Leaves that know their
      axes already keep them.
    axes: by path; paths that the store does not have are passed over.

  Returns:
    The store.

  Raises:
    CheckpointError: names that do not fit the rank of their leaf.
  """
  specs = store.specs()
  for path, names in axes.items():
    spec = specs.get(path)
    if spec is None or spec.axes is not None:
      continue
    if len(names) != len(spec.shape):
      raise errors.CheckpointError(
        f'{store.name}: {path} is {list(spec.shape)}, but its stored axes are '
        f'{tuple(names)}. They belong to other weights: write them anew '
        '(`save_checkpoint(..., axes=...)`), or remove them.'
      )
    specs[path] = typing.LeafSpec(spec.shape, spec.dtype, tuple(names))
  return store


def checked(
  specs: typing.SpecTree, axes: axes_lib.Rules
) -> dict[typing.Path, tuple[str, ...]]:
  """`{path: names}` of the axes that a user gives for a tree to be saved.

  Raises:
    StructureError: a rule that matches nothing, or does not fit the rank.
  """
  named = axes_lib.with_axes(specs, axes)
  return {p: spec.axes for p, spec in named.items() if spec.axes is not None}
