# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Many tasks over local tables at once, told as data, and their mixture."""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

import seqio
import yaml

from mergejax.core import errors
from mergejax.data import answers
from mergejax.data import mixtures
from mergejax.data import rows
from mergejax.data import tasks as tasks_lib

_SPLITS = ('train', 'validation', 'test')
# Of a task, besides words that evaluation alone reads.
_WORDS = ('files', 'inputs', 'targets', 'choices', 'label')
_EVALUATION = ('metric', 'expert')


def split_files(
  source: os.PathLike | str, splits: Sequence[str] = _SPLITS
) -> dict[str, pathlib.Path]:
  """`{split: file}` of a folder, or of one file that serves every split.

  Args:
    source: by path, or by path below the folder in `MERGEJAX_DATA`.
    splits: that are looked for.

  Raises:
    DataError: nothing is there, or several files of one split.
  """
  path = tasks_lib.locate(source)
  if path.is_file():
    return {split: path for split in splits}
  files = {}
  for split in splits:
    found = [path / f'{split}{suffix}' for suffix in rows.SUFFIXES]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
      raise errors.DataError(
        f'{path} holds more than one {split} file: '
        f'{", ".join(file.name for file in found)}. Leave one.'
      )
    if found:
      files[split] = found[0]
  if not files:
    raise errors.DataError(
      f'{path} holds no {", ".join(splits[:-1])} or {splits[-1]} file '
      f'({", ".join(rows.SUFFIXES)}).'
    )
  return files


def add_mixture(
  tasks: Mapping[str, Mapping[str, Any]] | os.PathLike | str,
  *,
  rates: str = 'proportional',
  cap: float | None = None,
  temperature: float = 1.0,
  vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Mixture:
  """Registers tasks over local tables, and their mixture.

  Args:
    tasks: `{name: {'files': FILES, 'inputs': TEMPLATE, 'targets': TEMPLATE}}`,
      FILES a file that is trained on or a folder of `{train,validation,test}`
      files; with `choices` and `label` instead of `targets` a task of
      `answers.add_choice_task`. Or a YAML file with these under `tasks`, such as
      a suite.
    rates: see `mixtures.add_mixture`.
    cap: likewise.
    temperature: likewise.
    vocabulary: bytes by default.

  Returns:
    The mixture. Numbers of tasks go by their names, and so in their order.

  Raises:
    UserError: unknown words, a task without a template, or one with choices
      beside one without; see `tasks.add_table_task`.

  Example:
    >>> import tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp()) / 'train.tsv'
    >>> _ = file.write_text('a\\tb\\nx\\ty\\n')
    >>> mixed = add_mixture({
    ...     'one': {'files': file, 'inputs': '{a}', 'targets': '{b}'}})
    >>> [task.name.split('_')[0] for task in mixed.tasks]
    ['one']
  """
  if not isinstance(tasks, Mapping):
    tasks = _of_file(pathlib.Path(tasks).expanduser())
  if not tasks:
    raise errors.DataError('A mixture has at least one task, not none.')
  made = [_add(name, dict(words), vocabulary) for name, words in tasks.items()]
  return mixtures.add_mixture(
    'tables', [task.name for task in made], rates=rates, cap=cap,
    temperature=temperature, by_content=True,
  )  # fmt: skip


def _of_file(path):
  if not path.is_file():
    raise errors.DataError(f'There is no file of tasks at {path}.')
  try:
    found = yaml.safe_load(path.read_text(encoding='utf-8'))
  except yaml.YAMLError as error:
    raise errors.DataError(f'{path} is not YAML: {error}') from error
  tasks = found.get('tasks') if isinstance(found, Mapping) else None
  if not isinstance(tasks, Mapping):
    raise errors.DataError(
      f'{path} must have `tasks`, a mapping from names to tasks.'
    )
  return tasks


def _add(name, words, vocabulary):
  words = {
    each: value for each, value in words.items() if each not in _EVALUATION
  }
  for word in words:
    if word not in _WORDS:
      raise errors.DataError(errors.near(str(word), _WORDS, f'word of {name},'))
  ranked = 'choices' in words
  needed = ('files', 'inputs', *(('label',) if ranked else ('targets',)))
  lacking = [word for word in needed if word not in words]
  if lacking or (ranked and 'targets' in words):
    raise errors.DataError(
      f'The task {name} needs files, inputs, and either targets or choices and '
      f'their label; it has {errors.some(sorted(words), 5)}.'
    )
  path = tasks_lib.locate(words.pop('files'))
  files = {'train': path} if path.is_file() else split_files(path)
  add = answers.add_choice_task if ranked else tasks_lib.add_table_task
  return add(name, files, vocabulary=vocabulary, by_content=True, **words)
