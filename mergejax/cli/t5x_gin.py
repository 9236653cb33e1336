# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5X's gin files, for `mergejax train`: put into our words, or refused.

They are read without T5X: bindings are looked up in the table of `t5x_words`,
and what they mean becomes the text of a gin file of ours, which `--dry_run`
shows. All words that mean nothing here are told in one message; those that do
not change what is trained are left aside and named.

Files of ours may be given after T5X's, to bind what T5X has no word for.
"""

import ast
from collections.abc import Iterator, Sequence
import contextlib
import importlib
import importlib.util
import pathlib
import re
import sys
import tempfile

from mergejax.cli import common
from mergejax.cli import t5x_reader
from mergejax.cli import t5x_words
from mergejax.core import errors

_OF_T5X = re.compile(
  r'^\s*(from t5x\b|import t5x\b|import __main__|include [\'"]t5x/)', re.M
)
_OF_OURS = re.compile(r'^\s*(from|import) mergejax\b', re.M)
# Modules whose configurables the table knows, or that only T5X needs.
_KNOWN_MODULES = re.compile(
  r'(t5x(\.(adafactor|checkpoints|decoding|gin_utils|models|partitioning|train|'
  r'trainer|utils|losses|examples\.(t5|scalable_t5|decoder_only)\.network))?|'
  r'__main__|__gin__\.\w+|seqio|jax(\.numpy)?|gin)'
)
_NETWORKS = re.compile(r't5x\.examples\.(t5|scalable_t5)\.network')


@contextlib.contextmanager
def in_our_words(
  files: Sequence[str],
  bindings: Sequence[tuple[str, str]],
  search_paths: Sequence[str] = (),
) -> Iterator[tuple[Sequence[str], Sequence[tuple[str, str]]]]:
  """Files and bindings of a command line, those of T5X put into our words.

  Args:
    files: of T5X and of ours, or of ours alone, which stay as they are.
    bindings: see `translate`; of T5X's names if there is a file of T5X.
    search_paths: likewise.

  Yields:
    `(files, bindings)` for `common.parse_gin`. What is left aside is named on
    standard error.
  """
  of_t5x, ours = divide(files, search_paths)
  if not of_t5x:
    yield files, bindings
    return
  text, asides = translate(of_t5x, bindings, search_paths)
  if asides:
    print(
      'Of the gin files of T5X this was left aside; it does not change what is '
      f'trained:\n{errors.listed(asides, 20)}',
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
) -> tuple[str, list[str]]:
  """A gin file of ours that says what files of T5X say.

  Args:
    files: of T5X; what they include is looked for below `search_paths` and
      beside an installed T5X.
    bindings: `(NAME, value)` of the command line.
    search_paths: folders.

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
  fields, asides = _look_up(read)
  _check_modules(read.modules)
  text = _write(fields, read)
  _import(read.modules, fields.get('imports.module'))
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


def _look_up(read):
  """`({section.field: value}, what is left aside)`."""
  fields, aside, refused, missing = dict(t5x_words.DEFAULTS), {}, [], {}
  for (scope, configurable, argument), value in read.bindings.items():
    name = f'{scope}/' * bool(scope) + f'{configurable}.{argument}'
    word = t5x_words.find(scope, configurable, argument)
    if word is not None and word.aside:
      # All of one configurable, or this word of it.
      if t5x_words.all_alike(scope, configurable):
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
      'a gin file that binds our words (`mergejax.cli.train`, see '
      'gin/runs/text_to_text.gin).'
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


def _network(fields, read):
  """`(module, configuration, its fields)`."""
  model = read.bindings.get(('', 'train', 'model'))
  if model is None:
    raise errors.ConfigError(
      'The gin files bind no train.model: give the file of a model, such as '
      't5x/examples/t5/t5_1_1/base.gin, and that of a run, such as '
      't5x/configs/runs/finetune.gin.'
    )
  found = _section(fields, 'network')
  if str(read.resolved(model)) == '@DecoderOnlyModel()':
    return 'lm.LanguageModel', 'lm.LMConfig', {'num_layers': 6, **found}
  defaults = {'num_encoder_layers': 6, 'num_decoder_layers': 6}
  networks = [name for name in read.modules if _NETWORKS.fullmatch(name)]
  if networks and 'scalable' in networks[-1]:
    defaults |= {'scan_layers': True, 'relative_per_layer': True}
  return 't5.Transformer', 't5.T5Config', {**defaults, **found}


def _section(fields, name):
  return {
    field.removeprefix(f'{name}.'): value
    for field, value in fields.items()
    if field.startswith(f'{name}.')
  }


def _kind(fields, decoder_only):
  """Which features the model is given."""
  lengths = fields.get('job.lengths') or {}
  if not decoder_only:
    return 'encoder_decoder'
  if fields.get('features.bidirectional'):
    return 'prefix_lm'
  if 'inputs' in lengths:
    raise errors.ConfigError(
      'A decoder-only model of T5X with inputs and targets that is causal '
      'throughout has no counterpart here: set '
      'DecoderOnlyModel.inputs_bidirectional_attention = True (a prefix '
      'language model), or train on targets alone.'
    )
  return 'lm'


def _write(fields, read):
  """The text of a gin file of ours."""
  module, config, network = _network(fields, read)
  job = _section(fields, 'job')
  for name in (
    'mixture_or_task',
    'lengths',
    'steps',
    'batch_size',
    'model_dir',
  ):
    if job.get(name) is None:
      raise errors.ConfigError(
        f'The gin files do not bind {name}: give the file of a run of T5X, '
        'such as t5x/configs/runs/finetune.gin.'
      )
  if job.get('initial_checkpoint') and fields.get('checkpoint.restore', True):
    job['restore'] = 'state'  # as T5X does: moments and step number too
  else:
    job.pop('initial_checkpoint', None)
  if not (job.get('save_every') and fields.get('checkpoint.save', True)):
    job['save_every'] = job['steps']
  job['kind'] = _kind(fields, module == 'lm.LanguageModel')
  job['loss'] = _section(fields, 'loss')
  size = fields.get('mesh.model') or 1
  if size > 1:
    job['mesh'] = {'model': size}
  optimizer = _section(fields, 'optimizer')
  rules = optimizer.get('logical_factor_rules')
  lines = [
    'from __gin__ import dynamic_registration',
    'from mergejax import partition',
    'from mergejax.cli import train',
    f'from mergejax.nn import {module.split(".")[0]}',
    'from mergejax.training import optim',
    'from mergejax.training import schedules',
    'train.run.job = @train.train_model',
    f'train.train_model.module = @{module}()',
    'train.train_model.optimizer = @optim.adafactor',
    *_block('train.train_model', job),
    f'{module}.config = @{config}()',
    *_block(config, network),
    'optim.adafactor.learning_rate = @schedules.factors()',
    *_block('schedules.factors', _section(fields, 'schedule')),
  ]
  if rules is not None:
    del optimizer['logical_factor_rules']
    lines.append(
      'optim.adafactor.logical_factor_rules = '
      '@optim.standard_logical_factor_rules()'
    )
  lines += _block('optim.adafactor', optimizer)
  if fields.get('rules.dims') == 2:
    lines.append('train.train_model.rules = @partition.fsdp()')
  return '\n'.join(lines) + '\n'


def _block(name, values):
  return [f'{name}.{field} = {value!r}' for field, value in values.items()]
