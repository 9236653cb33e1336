# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""seqio tasks over local TSV, JSONL and text files.

Files are named by path, or by a path below the folder in the environment
variable `MERGEJAX_DATA`.
"""

from collections.abc import Mapping
import os
import pathlib

import seqio

from mergejax import errors
from mergejax.data import features
from mergejax.data import preprocessors

# Examples that are shuffled together while reading. A document yields its
# pieces in order, so this should span several; it is part of a stream's state.
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
  raise errors.UserError(f'There is no {path} here, {where}.')


def _source(files: Mapping[str, os.PathLike | str]):
  """A line source and the parser of its format, told by the suffix."""
  paths = {split: str(locate(path)) for split, path in files.items()}
  suffixes = {pathlib.Path(path).suffix for path in paths.values()}
  if len(suffixes) != 1 or not suffixes <= {'.tsv', '.jsonl', '.txt'}:
    raise errors.UserError(
      'The files of a task must all be .tsv, all .jsonl or all .txt, not '
      f'{sorted(suffixes)}: {sorted(paths.values())}'
    )
  suffix = suffixes.pop()
  source = seqio.TextLineDataSource(
    split_to_filepattern=paths,
    skip_header_lines=1 if suffix == '.tsv' else 0,
  )
  return source, suffix, pathlib.Path(next(iter(paths.values())))


def num_examples(task: str, split: str = 'train') -> int:
  """Lines of a task's files, without headers.

  seqio is not told: it would hold a small task in memory and put all of it into
  every saved position of a stream.
  """
  source = seqio.TaskRegistry.get(task).source
  count = 0
  for path in source.list_shards(split):
    with open(path, 'rb') as stream:
      count += sum(1 for _ in stream) - (pathlib.Path(path).suffix == '.tsv')
  return count


def _columns(suffix, path, wanted):
  """The parser that gives the `wanted` columns of a file."""
  if suffix == '.txt':
    return preprocessors.parse_text
  if suffix == '.jsonl':
    return preprocessors.parse_jsonl(wanted)
  with open(path, encoding='utf-8') as stream:
    header = stream.readline().rstrip('\n').split('\t')
  for column in wanted:
    if column not in header:
      raise errors.UserError(errors.near(column, header, f'column of {path},'))
  return preprocessors.parse_tsv(header)


def _add(name, **arguments) -> seqio.Task:
  # A task's files are part of its meaning: the same name may be used again.
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
    name, shuffle_buffer_size=SHUFFLE_BUFFER, **arguments
  )


def add_text_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  vocabulary: seqio.Vocabulary | None = None,
  field: str = 'text',
) -> seqio.Task:
  """Registers a language-modelling task: documents cut to the given length.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`; JSONL with the text in `field`, or plain text with
      a document a line.
    vocabulary: bytes by default.
    field: where JSONL rows keep the text.

  Returns:
    The task; its feature is `targets`, each document ended by the end token.
  """
  source, suffix, path = _source(files)
  templates = {'targets': '{text}' if suffix == '.txt' else f'{{{field}}}'}
  return _add(
    name,
    source=source,
    preprocessors=[
      _columns(suffix, path, preprocessors.columns_of(templates)),
      preprocessors.format_features(templates),
      seqio.preprocessors.tokenize,
      preprocessors.end_documents,
      preprocessors.concatenate_and_split,
    ],
    output_features=features.language_model(
      vocabulary or features.vocabulary()
    ),
    metric_fns=[],
  )


def add_table_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  inputs: str,
  targets: str,
  vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
  """Registers a text-to-text task over the columns of TSV or JSONL files.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`.
    inputs: template of the input: `'cola sentence: {sentence}'`.
    targets: template of the target: `'{label}'`.
    vocabulary: bytes by default.

  Returns:
    The task; its features are `inputs` and `targets`.

  Raises:
    UserError: a missing file, mixed formats, or a column the file lacks.
  """
  source, suffix, path = _source(files)
  templates = {'inputs': inputs, 'targets': targets}
  return _add(
    name,
    source=source,
    preprocessors=[
      _columns(suffix, path, preprocessors.columns_of(templates)),
      preprocessors.format_features(templates),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=features.encoder_decoder(
      vocabulary or features.vocabulary()
    ),
    metric_fns=[],
  )


def add_corpora(
  folder: os.PathLike | str, vocabulary: seqio.Vocabulary | None = None
) -> dict[str, str]:
  """Registers a task per domain of a folder made by `corpora.write_splits`.

  Returns:
    `{domain: task name}`.
  """
  folder = pathlib.Path(folder)
  names = {}
  for domain in sorted(p.name for p in folder.iterdir() if p.is_dir()):
    files = {
      split: folder / domain / f'{split}.jsonl'
      for split in ('train', 'validation', 'test')
    }
    task_name = 'corpus_' + ''.join(c if c.isalnum() else '_' for c in domain)
    add_text_task(task_name, files, vocabulary=vocabulary)
    names[domain] = task_name
  return names
