# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder holds one run: what it was begun with is compared first of all."""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import jax

from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import identity

# Where and with what a run computes: they may change, and round otherwise.
_LAYOUT, _CODE = 'layout', 'code'


def layout(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Where a run computes, as plain data."""
  return {'mesh': dict(mesh.shape), 'processes': jax.process_count()}


def check(
  file: pathlib.Path,
  wanted: Mapping[str, Any],
  where: Mapping[str, Any] | None = None,
) -> None:
  """Refuses a folder that holds another run.

  Says if the run moved to other devices, or to another version of the code.

  Args:
    file: the JSON that `write` made, or where it will.
    wanted: what fixes the result of the run asked for.
    where: its `layout`, if the folder is to tell of it.

  Raises:
    UserError: lists all that differs.
  """
  if not file.exists():
    return
  found = checkpoint.read_json(file)
  before = {name: found.pop(name, {}) for name in (_LAYOUT, _CODE)}
  differing = errors.differences(found, identity.canonical(wanted))
  if differing:
    raise errors.ConfigError(
      f'{file.parent} holds a run with other settings:\n'
      f'{errors.listed(differing, 20)}\nName another folder, or remove it.'
    )
  moved = []
  for name, now in ((_LAYOUT, where), (_CODE, identity.code())):
    if before[name] and now:
      moved += errors.differences(before[name], identity.canonical(now))
  if moved and jax.process_index() == 0:
    print(
      f'{file.parent} goes on where it was not begun ({"; ".join(moved)}): '
      'sums may be rounded in another order, so the last digits may differ.',
      file=sys.stderr,
    )


def write(
  file: pathlib.Path,
  wanted: Mapping[str, Any],
  where: Mapping[str, Any],
) -> None:
  """Notes what a run was begun with, whole or not at all; the first process."""
  if jax.process_index() == 0 and not file.exists():
    with files.atomic_path(file, overwrite=True) as temporary:
      data = {**wanted, _LAYOUT: where, _CODE: identity.code()}
      text = json.dumps(identity.canonical(data), indent=2) + '\n'
      temporary.write_text(text)


def begun_with(file: pathlib.Path, name: str, default: Any) -> Any:
  """A setting of the run that a folder holds; the default if it holds none."""
  if not file.exists():
    return default
  return checkpoint.read_json(file).get(name, default)
