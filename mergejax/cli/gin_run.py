# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands that gin files describe: `--gin_file=... --gin.NAME=VALUE`."""

import argparse
from collections.abc import Callable, Sequence
import inspect
from typing import Any

import gin
from mergejax.cli import common
from mergejax.cli import t5x_gin
from mergejax.core import errors


def is_asked(arguments: Sequence[str]) -> bool:
  """Whether a command line has flags of gin."""
  files, paths, bindings, _ = common.split_gin_flags(arguments)
  return bool(files or paths or bindings)


def parser(command: str, description: str) -> argparse.ArgumentParser:
  """A parser of `mergejax COMMAND` with the flags of gin."""
  made = common.parser(command, description)
  made.add_argument(
    '--gin_file',
    action='append',
    help='a gin file, of ours or of T5X; later ones add to and override '
    'earlier ones',
  )
  made.add_argument('--gin_search_paths', help='folders, comma-separated')
  made.add_argument(
    '--dry_run',
    action='store_true',
    help='print the complete configuration, do nothing',
  )
  return made


def configure(
  command: str,
  arguments: Sequence[str],
  made: argparse.ArgumentParser,
) -> argparse.Namespace | None:
  """Reads gin files and bindings into gin's configuration.

  Args:
    command: 'train', 'evaluate' or 'infer'.
    arguments: of the command line.
    made: from `parser`.

  Returns:
    The other options; None if the configuration was all that was asked for,
    and is printed.

  Raises:
    ConfigError: see `common.parse_gin` and `t5x_gin.translate`.
  """
  files, paths, bindings, rest = common.split_gin_flags(arguments)
  options = made.parse_args(rest)
  if not files:
    raise errors.ConfigError(f'mergejax {command} needs --gin_file=FILE.')
  with t5x_gin.in_our_words(files, bindings, paths, command) as (files, given):
    common.parse_gin(files, given, paths)
  if options.dry_run:
    print(gin.config_str())
    return None
  return options


def run(
  command: str,
  description: str,
  function: Callable[..., Any],
  arguments: Sequence[str],
) -> None:
  """Calls a function as gin files bind it.

  Args:
    command: see `configure`.
    description: of what it does with gin files.
    function: of the command; the files bind its arguments.
    arguments: of the command line.

  Raises:
    ConfigError: likewise, and see `call`.
  """
  made = parser(command, description)
  if configure(command, arguments, made) is not None:
    call(command, function)


def call(command: str, function: Callable[..., Any]) -> None:
  """Calls a function with what the gin files that were read bind of it.

  Raises:
    ConfigError: the files do not bind an argument that it needs.
  """
  name = f'{function.__module__.rpartition(".")[2]}.{function.__name__}'
  try:
    given = gin.get_bindings(function, resolve_references=False)
  except ValueError:  # no file names it
    given = {}
  missing = [
    f'{name}.{argument}'
    for argument, parameter in inspect.signature(function).parameters.items()
    if parameter.default is parameter.empty and argument not in given
  ]
  if missing:
    raise errors.ConfigError(
      f'The gin files do not bind {", ".join(missing)}, which mergejax '
      f'{command} needs: are they those of such a run?'
    )
  gin.get_configurable(function)()
