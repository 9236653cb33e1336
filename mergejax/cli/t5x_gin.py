# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5X's gin files, put into our words, or refused.

They are read without T5X: bindings are looked up in the tables of `t5x_words`
and `t5x_inference_words`, and what they mean becomes the text of a gin file of
ours (`t5x_writing`), which `--dry_run` shows. All words that mean nothing here
are told in one message; those that do not change what a command does are left
aside and named.

Files of ours may be given after T5X's, to bind what T5X has no word for.
"""

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import importlib.util
import pathlib
import re
import sys
import tempfile
from typing import Any, NamedTuple

import seqio

from mergejax.cli import common
from mergejax.cli import t5x_inference_words
from mergejax.cli import t5x_reader
from mergejax.cli import t5x_words
from mergejax.cli import t5x_writing
from mergejax.core import errors
from mergejax.data import features
from mergejax.data import t5_tasks

_OF_T5X = re.compile(
  r'^\s*(from t5x\b|import t5x\b|import __main__|include [\'"]t5x/)', re.M
)
_OF_OURS = re.compile(r'^\s*(from|import) mergejax\b', re.M)
# Modules whose configurables the table knows, or that only T5X needs.
_KNOWN_MODULES = re.compile(
  r'(t5x(\.(adafactor|checkpoints|decoding|eval|gin_utils|infer|models|'
  r'partitioning|train|'
  r'trainer|utils|losses|examples\.(t5|scalable_t5|decoder_only)\.network))?|'
  r'__main__|__gin__\.\w+|seqio|jax(\.numpy)?|gin)'
)


class _Command(NamedTuple):
  """A command that takes T5X's files.

  Attributes:
    words: the table of what they may say.
    defaults: T5X's, where ours are others.
    write: `(fields, what was read) -> text`.
    kept: what words that are left aside do not change.
    example: a gin file of ours.
  """

  words: Mapping[str, Mapping[str, t5x_words.Word]]
  defaults: Mapping[str, Any]
  write: Callable[[t5x_writing.Fields, t5x_reader.Reader], str]
  kept: str
  example: str


COMMANDS: Mapping[str, _Command] = {
  'train': _Command(
    t5x_words.ALL, t5x_words.DEFAULTS, t5x_writing.write_train,
    'what is trained', 'gin/runs/text_to_text.gin',
  ),
  'evaluate': _Command(
    t5x_inference_words.EVALUATE, t5x_inference_words.DEFAULTS,
    t5x_writing.write_evaluate, 'the scores', 'gin/runs/eval.gin',
  ),
  'infer': _Command(
    t5x_inference_words.INFER, t5x_inference_words.DEFAULTS,
    t5x_writing.write_infer, 'the answers', 'gin/runs/infer.gin',
  ),
}  # fmt: skip


@contextlib.contextmanager
def in_our_words(
  files: Sequence[str],
  bindings: Sequence[tuple[str, str]],
  search_paths: Sequence[str] = (),
  command: str = 'train',
) -> Iterator[tuple[Sequence[str], Sequence[tuple[str, str]]]]:
  """Files and bindings of a command line, those of T5X put into our words.

  Args:
    files: of T5X and of ours, or of ours alone, which stay as they are.
    bindings: see `translate`; of T5X's names if there is a file of T5X.
    search_paths: likewise.
    command: of `COMMANDS`.

  Yields:
    `(files, bindings)` for `common.parse_gin`. What is left aside is named on
    standard error.
  """
  of_t5x, ours = divide(files, search_paths)
  if not of_t5x:
    yield files, bindings
    return
  text, asides = translate(of_t5x, bindings, search_paths, command)
  if asides:
    print(
      'Of the gin files of T5X this was left aside; it does not change '
      f'{COMMANDS[command].kept}:\n{errors.listed(asides, 20)}',
      file=sys.stderr,
    )
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 't5x.gin'
    file.write_text(text)
    yield [str(file), *ours], []


def divide(
  files: Sequence[str], search_paths: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
  """Which of the files of a command are T5X's, and which are ours.

  A file is of T5X if it imports or includes something of it, and so are files
  beside such a one that do not import anything of ours.

  Returns:
    `(of T5X, ours)`; none are of T5X if no file is.
  """
  texts = {file: t5x_reader.text_of(file, search_paths) for file in files}
  if not any(_OF_T5X.search(text or '') for text in texts.values()):
    return [], list(files)
  ours = [f for f, text in texts.items() if text and _OF_OURS.search(text)]
  return [file for file in files if file not in ours], ours


def translate(
  files: Sequence[str],
  bindings: Sequence[tuple[str, str]] = (),
  search_paths: Sequence[str] = (),
  command: str = 'train',
) -> tuple[str, list[str]]:
  """A gin file of ours that says what files of T5X say.

  Args:
    files: of T5X; what they include is looked for below `search_paths` and
      beside an installed T5X.
    bindings: `(NAME, value)` of the command line.
    search_paths: folders.
    command: of `COMMANDS`.

  Returns:
    `(text, names of the bindings that are left aside and why)`. Modules that
    the files import, for tasks of the user's own, are imported.

  Raises:
    ConfigError: words or values that mean nothing here, all of them; names
      that must be set; a file that is missing.
  """
  read = t5x_reader.Reader(search_paths)
  for file in files:
    read.add_file(file)
  for name, value in bindings:
    if '.' not in name and name not in read.macros:
      raise errors.ConfigError(errors.near(name, read.macros, 'gin name'))
    read.add_text(f'{name} = {common.literal(value)}', f'--gin.{name}')
  how = COMMANDS[command]
  fields, asides = _look_up(read, how)
  _check_modules(read.modules)
  text = how.write(fields, read)
  _import(read.modules, fields.get('imports.module'))
  _add_task(fields, read)
  return text, asides


def _shown(value):
  return str(value) if isinstance(value, t5x_reader.Reference) else value


def _is_plain(value):
  """Whether a value can be written down: no reference is in it."""
  try:
    ast.literal_eval(repr(value))
  except (SyntaxError, ValueError):
    return False
  return True


def _look_up(read, how):
  """`({section.field: value}, what is left aside)`."""
  fields, aside, refused, missing = dict(how.defaults), {}, [], {}
  for (scope, configurable, argument), value in read.bindings.items():
    name = f'{scope}/' * bool(scope) + f'{configurable}.{argument}'
    word = t5x_words.find(how.words, scope, configurable, argument)
    if word is not None and word.aside:
      # All of one configurable, or this word of it.
      if t5x_words.all_alike(how.words, scope, configurable):
        name = name.removesuffix(argument) + '*'
      aside.setdefault(word.aside, {})[name] = None
      continue
    value = read.resolved(value)
    if isinstance(value, t5x_reader.Macro):
      missing[value.name] = None
    elif word is None:
      refused.append(f'{name}: not known here')
    elif word.values and _shown(value) not in word.values:
      known = ' or '.join(map(str, word.values))
      advice = f'; {word.advice}' if word.advice else ''
      refused.append(f'{name} = {_shown(value)}: only {known}{advice}')
    elif not word.values and not _is_plain(value):
      refused.append(f'{name} = {value}: a plain value was expected')
    elif word.target is not None:
      given = word.convert(value)
      # Of two names for one field, the one that says something counts.
      if given is not None or word.target not in fields:
        fields[word.target] = given
  if refused:
    raise errors.ConfigError(
      'These words of T5X mean nothing here, so that the run would not be what '
      f'the files say:\n{errors.listed(refused, 40)}\nLeave them out, or give '
      'a gin file that binds our words, see ' + f'{how.example}.'
    )
  if missing:
    raise errors.ConfigError(
      f'These gin names must be set: {", ".join(missing)}. For example '
      f'--gin.{next(iter(missing))}=VALUE.'
    )
  lines = [f'{what}: {", ".join(names)}' for what, names in aside.items()]
  return fields, lines


def _check_modules(modules):
  """Raises for parts of T5X whose words the table does not have."""
  unknown = [
    name
    for name in modules
    if name.split('.')[0] == 't5x' and not _KNOWN_MODULES.fullmatch(name)
  ]
  if unknown:
    raise errors.ConfigError(
      f'These modules of T5X have no counterpart here: {", ".join(unknown)}.'
    )


def _import(modules, module):
  """Imports what brings tasks: the user's modules, and T5's if it is there."""
  wanted = [name for name in modules if not _KNOWN_MODULES.fullmatch(name)]
  for name in dict.fromkeys([*wanted, *([module] if module else [])]):
    try:
      # `from my_package import my_tasks` is my_package.my_tasks here.
      importlib.import_module(name)
    except ImportError as error:
      if name.split('.')[0] == 't5' and importlib.util.find_spec('t5') is None:
        print(
          f'{name} is not installed: of its tasks only those that something '
          'else registers are known.',
          file=sys.stderr,
        )
        continue
      raise errors.ConfigError(
        f'The gin files import {name}, which cannot be imported ({error}). Run '
        'from the folder that holds it with PYTHONPATH=., or leave the line '
        'out if its tasks are not needed.'
      ) from error


def _add_task(fields, read):
  """Registers a task of T5's suite where nothing else has; others are not ours.

  Its vocabulary is that of the gin files, as T5X checks that it is.
  """
  name = fields.get('job.mixture_or_task') or fields.get('data.mixture')
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name in known or name not in t5_tasks.TASKS:
    return
  given = [
    str(read.resolved(read.bindings.get(('', model, argument))))
    for model, argument in (
      ('EncoderDecoderModel', 'input_vocabulary'),
      ('DecoderOnlyModel', 'vocabulary'),
    )
  ]
  settings = {}
  if '@SentencePieceVocabulary()' in given:
    settings = {
      'name': fields.get('vocabulary.name', 'sentencepiece_model_file'),
      'extra_ids': fields.get('vocabulary.extra_ids') or 0,
    }
  t5_tasks.add(name, vocabulary=features.vocabulary(**settings))
