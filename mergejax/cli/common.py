# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the commands share: gin files and T5X's flags, messages, exit codes."""

import argparse
import ast
from collections.abc import Callable, Mapping, Sequence
import contextlib
import inspect
import logging
import os
import pathlib
import re
import signal
import sys
from typing import Any

import yaml

from mergejax import partition
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import stop as stop_lib

# gin names of the past -> what to do instead.
_REPLACED = {
  'TOTAL_STEPS': (
    'The learning rate spans SEED_STEPS + BRANCH_STEPS by itself: leave it out.'
  ),
}
# Modules of the past that gin files name -> their names now; longest first.
_MOVED = {
  'mergejax.train.hooks': 'mergejax.training.callbacks',
  'mergejax.train': 'mergejax.training',
  'mergejax.run': 'mergejax.cli',
  'mergejax.stats': 'mergejax.statistics',
  'mergejax.store': 'mergejax.checkpoints',
  'mergejax.mesh': 'mergejax.partition',
}


class _Parser(argparse.ArgumentParser):
  """Errors of the command line are `UserError`s, like all others."""

  def error(self, message):
    match = re.search(r'unrecognized arguments: (\S+)', message)
    if match and match[1].startswith('-'):
      known = [o for action in self._actions for o in action.option_strings]
      name = match[1].split('=')[0]
      message = errors.near(name, known, f'option of {self.prog},')
    raise errors.ConfigError(f'{message}\nSee `{self.prog} --help`.')


def parser(command: str, description: str) -> argparse.ArgumentParser:
  """An argument parser for `mergejax COMMAND`."""
  return _Parser(
    prog=f'mergejax {command}', description=description, allow_abbrev=False
  )


def mapping(flag: str, text: str, example: str) -> Mapping[str, Any]:
  """A mapping that the command line gives as YAML.

  Args:
    flag: whose value it is.
    text: of the value.
    example: for the message.

  Raises:
    ConfigError: no YAML, or no mapping.
  """
  try:
    found = yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise errors.ConfigError(f'{flag} is not YAML: {error}') from error
  if not isinstance(found, Mapping):
    raise errors.ConfigError(
      f"{flag} is a mapping, such as '{example}', not {text!r}."
    )
  return found


def write_text(path: os.PathLike | str, text: str) -> None:
  """Writes a file for people to read, whole or not at all."""
  path = pathlib.Path(path)
  if path.is_symlink() or path.exists() and not path.is_file():
    path.write_text(text, encoding='utf-8')  # /dev/stdout, or a pipe
    return
  with files.atomic_path(path, overwrite=True) as temporary:
    temporary.write_text(text, encoding='utf-8')


def run_reporting_mistakes(
  main: Callable[[], None], stopped_code: int = 0
) -> int:
  """Runs a command; returns its exit code.

  Args:
    main: the command.
    stopped_code: the exit code if it was asked to stop (SIGTERM) and saved what
      it had: 0 for training, 143 where the result is not complete.

  Returns:
    0 if the result is complete, 2 with one message and no traceback for a
    mistake in what was asked for, 130 if it was interrupted, 141 without a word
    if whoever reads the output went away (`mergejax methods | head`).
  """

  # What works in steps has a request of its own, to end between two of them.
  stop = stop_lib.StopRequest(at_once='Stopped outside of a training step.')
  try:
    with stop:
      try:
        main()
      except SystemExit:  # of `--help`
        sys.stdout.flush()
        raise
      sys.stdout.flush()
  except BrokenPipeError:
    # What is still in the buffer would complain again when Python ends.
    with contextlib.suppress(OSError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except errors.UserError as error:
    print(f'mergejax: {error.message}', file=sys.stderr)
    return 2
  except OSError as error:
    where = f' {error.filename}' if error.filename else ''
    print(
      f'mergejax: could not read or write{where}: {error.strerror or error}',
      file=sys.stderr,
    )
    return 2
  except errors.Stopped as stopped:
    print(
      f'{str(stopped).splitlines()[0]} Everything is saved; the same command '
      'continues.',
      file=sys.stderr,
    )
    return stopped_code
  except KeyboardInterrupt:
    print('mergejax: interrupted.', file=sys.stderr)
    return 130
  return 0


def gin_folder() -> pathlib.Path:
  """The folder of the gin files that come with the package."""
  package = pathlib.Path(__file__).parent.parent
  installed = package / '_gin'
  return installed if installed.is_dir() else package.parent / 'gin'


def split_gin_flags(
  arguments: Sequence[str],
) -> tuple[list[str], list[str], list[tuple[str, str]], list[str]]:
  """Sorts T5X's flags out of a command line.

  Args:
    arguments: `--gin_file=F`, `--gin_search_paths=A,B`, `--gin.NAME=VALUE`, in
      any number, and anything else.

  Returns:
    `(files, search paths, [(name, value)], the rest)`.
  """
  gin_files, paths, bindings, rest = [], [], [], []
  for argument in arguments:
    name, _, value = argument.partition('=')
    if name == '--gin_file':
      gin_files.append(value)
    elif name == '--gin_search_paths':
      paths += value.split(',')
    elif name.startswith('--gin.'):
      bindings.append((name.removeprefix('--gin.'), value))
    else:
      rest.append(argument)
  return gin_files, paths, bindings, rest


def literal(value: str) -> str:
  """A gin value; bare words are strings, so shells need no nested quotes."""
  if value.lstrip('[( ').startswith(('@', '%')):  # lists of references too
    return value
  try:
    ast.literal_eval(value)
    return value
  except (ValueError, SyntaxError):
    return repr(value)


def parse_gin(
  gin_files: Sequence[str],
  bindings: Sequence[tuple[str, str]],
  search_paths: Sequence[str] = (),
) -> None:
  """Reads gin files and bindings into gin's configuration.

  Args:
    gin_files: found by path, in `search_paths`, or in the package.
    bindings: `(NAME, value)` for macros that the files define, or
      `(module.function.argument, value)`.
    search_paths: folders to look in.

  Raises:
    UserError: a missing file, a name that no file defines (near ones are
      offered), a wrong parameter, or a macro that was left to be set.
  """
  import gin  # pylint: disable=import-outside-toplevel

  gin.clear_config()
  for path in (*search_paths, os.fspath(gin_folder()), ''):
    gin.add_config_file_search_path(path)
  gin_files = [_shipped(file) for file in gin_files]
  logging.disable(logging.ERROR)  # gin logs every folder it looks in
  try:
    gin.parse_config_files_and_bindings(
      gin_files, None, skip_unknown=False, finalize_config=False
    )
    known = _macros()
    for name, value in bindings:
      if name in _REPLACED and name not in known:
        raise errors.ConfigError(
          f'There is no gin name {name} any more. {_REPLACED[name]}'
        )
      if '.' not in name and name not in known:
        raise errors.ConfigError(errors.near(name, known, 'gin name'))
      gin.parse_config(f'{name} = {literal(value)}')
  except errors.UserError:
    raise
  except (
    OSError,
    ValueError,
    SyntaxError,
    AttributeError,
    ImportError,
  ) as error:
    raise errors.ConfigError(_explain(str(error))) from error
  finally:
    logging.disable(logging.NOTSET)
  missing = [
    name
    for name in _macros()
    if repr(gin.query_parameter(f'%{name}')) == '%gin.REQUIRED'
  ]
  if missing:
    raise errors.ConfigError(
      f'These gin names must be set: {", ".join(missing)}. For example '
      f'--gin.{missing[0]}=VALUE.'
    )
  gin.finalize()


def mesh_sizes(text: str | None) -> dict[str, int] | None:
  """`--mesh data=32,model=8` as sizes of mesh axes; None without it.

  Raises:
    ConfigError: an axis of another name, or a size that is no whole number.
  """
  if text is None:
    return None
  sizes = {}
  for part in text.split(','):
    name, _, size = part.partition('=')
    if name not in partition.AXES:
      raise errors.ConfigError(errors.near(name, partition.AXES, 'mesh axis'))
    try:
      sizes[name] = int(size)
    except ValueError as error:
      raise errors.ConfigError(
        f'--mesh gives each axis a whole number, data=32,model=8, not {part!r}.'
      ) from error
  return sizes


def _explain(message: str) -> str:
  """gin's message, with near names for a parameter that does not exist."""
  match = re.search(r"No module named '(mergejax\.[\w.]+)'", message)
  for old, new in _MOVED.items() if match else ():
    if (match[1] + '.').startswith(old + '.'):
      return (
        f'gin: there is no module {old} any more; it is {new} now. Change that '
        'line of the gin file: what it imports is called as before. ('
        f'{" ".join(message.split())})'
      )
  match = re.search(
    r"Configurable '(\S+)' doesn't have a parameter named '(\w+)'", message
  )
  if match:
    *module, function = match[1].split('.')
    ending = '.' + '.'.join(module)
    for name, loaded in list(sys.modules.items()):
      if ('.' + name).endswith(ending) and hasattr(loaded, function):
        known = inspect.signature(getattr(loaded, function)).parameters
        return errors.near(match[2], known, f'gin parameter of {match[1]},')
  return 'gin: ' + ' '.join(message.strip().splitlines()[:3])


def _shipped(file: str) -> str:
  """`gin/runs/x.gin` also names the file of the package, from anywhere."""
  if not file:
    raise errors.ConfigError('--gin_file needs a file name.')
  if not pathlib.Path(file).exists() and file.startswith('gin/'):
    inside = gin_folder() / file.removeprefix('gin/')
    if inside.exists():
      return str(inside)
  return file


def _macros() -> list[str]:
  import gin  # pylint: disable=import-outside-toplevel

  found = re.findall(r'^([A-Za-z_]\w*) =', gin.config_str(), re.M)
  return sorted(set(found))
