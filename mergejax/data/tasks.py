# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""seqio tasks over local TSV, JSONL and text files.

Files are named by path, or by a path below the folder in the environment
variable `MERGEJAX_DATA`. A task is what its files hold and what is made of
them: a name that is taken by another one is an error.
"""

from collections.abc import Mapping
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
from typing import Any

import seqio

from mergejax.core import checksums
from mergejax.core import errors
from mergejax.data import features
from mergejax.data import preprocessors
from mergejax.data import rows
from mergejax.data import sources
from mergejax.data import tfds_sets

# Files are shuffled whole; but a document yields its pieces in order, so that
# many pieces are shuffled again. They are part of a stream's state.
SHUFFLE_BUFFER = 2_000


def locate(path: os.PathLike | str) -> pathlib.Path:
  """A file or folder by path, or by path below `MERGEJAX_DATA`.

  Raises:
    UserError: it is in neither place.
  """
  direct = pathlib.Path(path).expanduser()
  if direct.exists():
    return direct
  root = os.environ.get('MERGEJAX_DATA')
  if root and (pathlib.Path(root) / path).exists():
    return pathlib.Path(root) / path
  where = (
    f'nor under MERGEJAX_DATA={root}'
    if root
    else ('and MERGEJAX_DATA is not set')
  )
  raise errors.DataError(f'There is no {path} here, {where}.')


def source_of(
  files: Mapping[str, os.PathLike | str],
  templates: Mapping[str, str],
  vocabulary: seqio.Vocabulary,
  *,
  example_a_row: bool,
  made_by: Mapping[str, Any] | None = None,
) -> sources.RowSource:
  """The source of a task over files of one format.

  Args:
    files: `{split: file}`.
    templates: of the features; they name the columns that are read.
    vocabulary: of the task.
    example_a_row: see `sources.RowSource`.
    made_by: what else makes examples of the rows, as plain data.

  Raises:
    UserError: a missing file, mixed formats, or a column that no file has.
  """
  paths = {split: locate(path) for split, path in files.items()}
  suffixes = {path.suffix for path in paths.values()}
  if len(suffixes) != 1 or not suffixes <= set(rows.SUFFIXES):
    raise errors.DataError(
      'The files of a task must all be .tsv, all .jsonl or all .txt, not '
      f'{sorted(suffixes)}: {sorted(map(str, paths.values()))}'
    )
  wanted = preprocessors.columns_of(templates)
  sums = {split: checksums.SUMS.of(path) for split, path in paths.items()}
  making = {
    'suffix': suffixes.pop(),
    'templates': dict(templates),
    'vocabulary': _identity(vocabulary),
    'example_a_row': example_a_row,
    **({'made_by': made_by} if made_by else {}),
  }
  source = sources.RowSource(
    paths, sums, wanted, identity=_digest({'files': sums, **making}),
    making=_digest(making), example_a_row=example_a_row,
  )  # fmt: skip
  _check_columns(source)
  _tell_shared_files(paths, sums)
  return source


def _digest(what):
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _identity(vocabulary):
  """What makes two vocabularies the same; the path of a file does not."""
  model = getattr(vocabulary, 'sp_model', b'') or b''
  return [
    type(vocabulary).__qualname__,
    vocabulary.vocab_size,
    vocabulary.extra_ids,
    hashlib.sha256(model).hexdigest(),
  ]


def _check_columns(source):
  """Raises if no split has a column, which must be a slip of the pen.

  A split may lack one (the test files of GLUE have no label) until it is read.
  """
  headers = {
    path: rows.Rows(path).columns
    for path in source.files.values()
    if path.suffix == '.tsv'
  }
  for column in source.wanted:
    if headers and not any(column in header for header in headers.values()):
      path, header = next(iter(headers.items()))
      raise errors.DataError(errors.near(column, header, f'column of {path},'))


def _tell_shared_files(paths, sums):
  by_sum: dict[str, list[str]] = {}
  for split, total in sums.items():
    by_sum.setdefault(total, []).append(split)
  for splits in by_sum.values():
    path = paths[splits[0]]
    if len(splits) > 1 and path.stat().st_size:
      logging.warning(
        'The splits %s hold the same rows: %s. What is trained or chosen on '
        'one of them is measured on itself.',
        ' and '.join(splits),
        path,
      )


def num_examples(task: str, split: str = 'train') -> int:
  """Examples of a task before they are cut into pieces.

  seqio is not told: it would hold a small task in memory and put all of it into
  every saved position of a stream.

  Raises:
    UserError: the task has no such split, does not know how many it has, or
      its TFDS set is not on this machine.
  """
  one = seqio.TaskRegistry.get(task)
  check_split(one, split)
  if isinstance(one.source, sources.RowSource):
    return len(one.source.rows(split))
  tfds_sets.check([one])
  count = one.num_input_examples(split)
  if count is None:
    raise errors.DataError(
      f'The task {task} does not tell how many examples its split {split!r} '
      'has: give its source num_input_examples, or the mixture fixed rates.'
    )
  return count


def check_split(
  mixture_or_task: seqio.Mixture | seqio.Task, split: str
) -> None:
  """Raises if a task, or any member of a mixture, lacks a split."""
  for task in seqio.get_subtasks(mixture_or_task):
    if split not in task.splits:
      raise errors.DataError(
        f'The task {task.name} has no split {split!r}. It has '
        f'{", ".join(sorted(task.splits))}.'
      )


def register(
  name: str, by_content: bool, source: sources.RowSource, **arguments: Any
) -> seqio.Task:
  """Adds a task to seqio's, in place of one of the same content.

  Raises:
    UserError: a name that seqio does not take, or that another task has.
  """
  if by_content:
    name = ''.join(c if c.isalnum() else '_' for c in name)
    name = f'{name}_{source.identity[:16]}'
  if not re.fullmatch(r'[\w.:#]+', name):
    raise errors.DataError(
      f'The name of a task has letters, digits, _ . : and #, not {name!r}.'
    )
  if name in seqio.TaskRegistry.names():
    old = seqio.TaskRegistry.get(name).source
    if getattr(old, 'identity', None) != source.identity:
      raise errors.DataError(
        f'There is a task {name!r} of other files, templates or vocabulary '
        'already: give this one another name, or remove that one with '
        f'seqio.TaskRegistry.remove({name!r}).'
      )
    # The same content may lie elsewhere now.
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(name, source=source, metric_fns=[], **arguments)


def text_templates(
  files: Mapping[str, os.PathLike | str], field: str
) -> dict[str, str]:
  """The template of documents: a line of text, or a field of JSONL rows."""
  suffixes = {pathlib.Path(path).suffix for path in files.values()}
  return {'targets': '{text}' if '.txt' in suffixes else f'{{{field}}}'}


def add_text_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  vocabulary: seqio.Vocabulary | None = None,
  field: str = 'text',
  by_content: bool = False,
) -> seqio.Task:
  """Registers a language-modelling task: documents cut to the given length.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`; JSONL with the text in `field`, or plain text with
      a document a line.
    vocabulary: bytes by default.
    field: where JSONL rows keep the text.
    by_content: append a digest of the content to the name, so that it cannot
      be that of another task.

  Returns:
    The task; its feature is `targets`, each document ended by the end token.

  Raises:
    UserError: a missing file, mixed formats, or a name that is taken.
  """
  templates = text_templates(files, field)
  vocabulary = vocabulary or features.vocabulary()
  return register(
    name,
    by_content,
    source_of(files, templates, vocabulary, example_a_row=False),
    shuffle_buffer_size=SHUFFLE_BUFFER,
    preprocessors=[
      preprocessors.format_features(templates),
      preprocessors.tokenize_documents,
      preprocessors.concatenate_and_split,
    ],
    output_features=features.language_model(vocabulary),
  )


def add_table_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  inputs: str,
  targets: str,
  vocabulary: seqio.Vocabulary | None = None,
  by_content: bool = False,
) -> seqio.Task:
  """Registers a text-to-text task over the columns of TSV or JSONL files.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`.
    inputs: template of the input: `'cola sentence: {sentence}'`.
    targets: template of the target: `'{label}'`.
    vocabulary: bytes by default.
    by_content: append a digest of the content to the name, so that it cannot
      be that of another task.

  Returns:
    The task; its features are `inputs` and `targets`.

  Raises:
    UserError: a missing file, mixed formats, a column that no file has, or a
      name that is taken. A column that one split lacks is told when that split
      is read.
  """
  templates = {'inputs': inputs, 'targets': targets}
  vocabulary = vocabulary or features.vocabulary()
  return register(
    name,
    by_content,
    source_of(files, templates, vocabulary, example_a_row=True),
    shuffle_buffer_size=None,  # the source shuffles whole files
    preprocessors=[
      functools.partial(preprocessors.filled_and_tokenized, templates=templates)
    ],
    output_features=features.encoder_decoder(vocabulary),
  )


def corpora_files(
  folder: os.PathLike | str,
) -> dict[str, dict[str, pathlib.Path]]:
  """`{domain: {split: file}}` of a folder made by `corpora.write_splits`."""
  folder = pathlib.Path(folder)
  splits = ('train', 'validation', 'test')
  return {
    domain: {split: folder / domain / f'{split}.jsonl' for split in splits}
    for domain in sorted(p.name for p in folder.iterdir() if p.is_dir())
  }


def add_corpora(
  folder: os.PathLike | str, vocabulary: seqio.Vocabulary | None = None
) -> dict[str, str]:
  """Registers a task per domain of a folder made by `corpora.write_splits`.

  Returns:
    `{domain: task name}`.
  """
  names = {}
  for domain, files in corpora_files(folder).items():
    task = add_text_task(
      f'corpus_{domain}', files, vocabulary=vocabulary, by_content=True
    )
    names[domain] = task.name
  return names
