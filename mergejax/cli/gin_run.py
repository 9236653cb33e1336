# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands that gin files describe: `--gin_file=... --gin.NAME=VALUE`."""

import argparse
from collections.abc import Callable, Sequence
import inspect
from typing import Any

import gin
from mergejax import partition
from mergejax.cli import common
from mergejax.cli import t5x_gin
from mergejax.core import errors


def is_asked(arguments: Sequence[str]) -> bool:
  """Whether a command line has flags of gin."""
  files, paths, bindings, _ = common.split_gin_flags(arguments)
  return bool(files or paths or bindings)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
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
  made.add_argument(
    '--multiprocess',
    action='store_true',
    help='join the processes that the environment tells of (a TPU pod, Slurm)',
  )
  made.add_argument('--coordinator_address', help='host:port, to join by hand')
  made.add_argument('--process_count', type=int)
  made.add_argument('--process_index', type=int)
  return made


def run(
  command: str,
  description: str,
  function: Callable[..., Any],
  arguments: Sequence[str],
) -> None:
  """Calls a function as gin files bind it, in all processes of a run.

  Args:
    command: 'train', 'evaluate' or 'infer'.
    description: of what it does with gin files.
    function: of the command; the files bind its arguments.
    arguments: of the command line.

  Raises:
    ConfigError: see `common.parse_gin`, `t5x_gin.translate`,
      `partition.join_processes` and `call`.
  """
  files, paths, bindings, rest = common.split_gin_flags(arguments)
  options = _parser(command, description).parse_args(rest)
  if not files:
    raise errors.ConfigError(f'mergejax {command} needs --gin_file=FILE.')
  with t5x_gin.in_our_words(files, bindings, paths, command) as (files, given):
    common.parse_gin(files, given, paths)
  if options.dry_run:
    print(gin.config_str())
    return
  if options.multiprocess or options.coordinator_address:
    partition.join_processes(
      options.coordinator_address, options.process_count, options.process_index
    )
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
