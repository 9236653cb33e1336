# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of models in recipes: `path`, `path+adapter`, mergekit's long form."""

import pathlib
from typing import Any

from mergejax.adapters import changes
from mergejax.merging.recipes import parameters

_WORDS = ('model', 'lora', 'path', 'revision', 'override_architecture')


def read(value: Any, what: str, report: parameters.Report) -> str | None:
  """The name of a model, revisions left out.

  Args:
    value: text, `{model: ..., lora: ...}` or `{path: ..., revision: ...}`.
    what: which word of the recipe names it, for messages.
    report: gets the problem, and what has no meaning for a folder.

  Returns:
    `path` or `path+adapter`; None if there is none.
  """
  if value is None:
    return None
  if isinstance(value, dict):
    value = _short(value, what, report)
  if not isinstance(value, str):
    report.problems.append(f'{what!r} must be a path or a word, not {value!r}.')
    return None
  parts = filter(None, changes.parts(value))
  return '+'.join(_folder(part, report) for part in parts)


def _short(value, what, report):
  """`path+adapter` of the long form."""

  def path(part):
    if not isinstance(part, dict):
      return part
    if part.get('revision'):
      return f'{part.get("path")}@{part["revision"]}'
    return part.get('path')

  if 'override_architecture' in value:
    report.ignore(
      'override_architecture', what, 'parameters are merged by their names'
    )
  parameters.check_keys(value, _WORDS, what, report)
  model, lora = path(value.get('model', value)), path(value.get('lora'))
  return f'{model}+{lora}' if lora else model


def _folder(part, report):
  """`path@revision` names a commit of a hub; a folder has none."""
  path, at, revision = part.partition('@')
  if not at or pathlib.Path(part).expanduser().exists():
    return part
  report.remark(
    f'{path}: a folder has no revisions; what it holds is taken, not '
    f'{revision!r}'
  )
  return path
