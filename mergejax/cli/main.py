# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: `mergejax COMMAND`, the same as `python -m mergejax`."""

from collections.abc import Iterator, Sequence
import contextlib
import gc
import importlib
import os
import pathlib
import sys

from mergejax.cli import common
from mergejax.core import errors

# command -> what it does; the module of the same name has `main(arguments)`.
COMMANDS = {
  'quickstart': 'Branch-Train-Merge, or sparse models, on text this machine has',
  'train': 'train what a gin file describes',
  'cache': 'tokenise tasks once, by Apache Beam, for data too large to read',
  'forest': 'experts of one seed: create, add, remove, average, evaluate',
  'moe': 'sparse models of dense ones, and back: upcycle, mix, dense, fewer',
  'merge': 'merge checkpoints as a recipe says: RECIPE OUT',
  'stats': 'Gram matrices, Fishers, or a survey of models, before merging',
  'search': 'coefficients of a merge, chosen on held-out data: RECIPE OUT',
  'align': 'permute the units of one model to match another: A B OUT',
  'rank': 'which model for which task, without training',
  'evaluate': 'a table of models and recipes by tasks or domains',
  'infer': 'what a model says to lines of text: CHECKPOINT',
  'inspect': 'list the parameters of a checkpoint',
  'convert': 'copy a checkpoint into another format: SRC DST',
  'export': 'decoding for a server that has jax alone: CHECKPOINT OUT',
  'compile': 'what a run or a merge needs of a pod, without the pod',
  'extract-lora': 'the best adapter for a difference: MODEL BASE OUT',
  'methods': 'the merge methods and their options',
}

_READS_TEXT = (
  'quickstart', 'train', 'cache', 'evaluate', 'infer', 'export', 'search',
  'rank', 'compile',
)  # fmt: skip
# These read text only if they are given a suite of tasks, or corpora.
_MAY_READ_TEXT = ('stats', 'align', 'forest', 'moe')


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
  """Python looks for no garbage meanwhile.

  Modules make almost a million objects that stay: to look through them again and
  again was near a quarter of the time that TensorFlow, seqio and JAX take.
  """
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


def _import_tensorflow() -> None:
  """Imports TensorFlow without the start-up lines that C++ writes.

  TensorFlow only reads text here; what it says of oneDNN and CUDA would hide
  our own messages.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  saved = os.dup(2)
  sink = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(sink, 2)
    tensorflow = importlib.import_module('tensorflow')
    # Accelerators belong to JAX; TensorFlow would take all of their memory.
    tensorflow.config.set_visible_devices([], 'GPU')
    importlib.import_module('tensorflow_text')
  except ImportError as error:
    raise errors.ConfigError(
      f'This command reads text through seqio, and {error.name} is not '
      "installed: pip install 'mergejax[data,plots]'."
    ) from error
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(sink)


def _usage() -> str:
  width = max(map(len, COMMANDS)) + 2
  lines = [f'  {name:<{width}}{text}' for name, text in COMMANDS.items()]
  return (
    'usage: mergejax COMMAND [--help] [--import MODULE] ...\n\ncommands:\n'
    + '\n'.join(lines)
    + '\n\n--import MODULE, for every command: a module, or a .py file, of '
    'your own\nthat registers model families, methods or tasks'
  )


def _split_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """`(modules to import, the other arguments)` of a command line."""
  modules, rest = [], []
  arguments = iter(arguments)
  for argument in arguments:
    name, equals, value = argument.partition('=')
    if name != '--import':
      rest.append(argument)
      continue
    module = value if equals else next(arguments, '')
    if not module:
      raise errors.ConfigError(
        '--import needs the name of a module: `--import my_models`.'
      )
    modules.append(module)
  return modules, rest


def _import_module(name: str) -> None:
  """Imports a module of the user's: from the current folder, too, or a file.

  Raises:
    ConfigError: there is no such module.
  """
  folder = os.getcwd()
  if name.endswith('.py'):
    file = pathlib.Path(name).expanduser().resolve()
    folder, name = str(file.parent), file.stem
  if folder not in sys.path:
    sys.path.insert(0, folder)
  try:
    importlib.import_module(name)
  except ModuleNotFoundError as error:
    # What the module itself misses is its own message.
    if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
      raise
    raise errors.ConfigError(
      f'--import {name}: there is no module of this name in {folder} or among '
      'what is installed. Give its dotted name, or the path of its .py file.'
    ) from error


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one command and returns its exit code."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if not arguments or arguments[0] in ('-h', '--help', 'help'):
    code = common.run_reporting_mistakes(lambda: print(_usage()))
    return code if arguments else 2
  command, *rest = arguments
  if command not in COMMANDS:
    text = errors.near(command, COMMANDS, 'command')
    print(f'mergejax: {text}', file=sys.stderr)
    return 2

  def run():
    modules, options = _split_imports(rest)
    given = any(one.startswith(('--suite', '--corpora')) for one in options)
    with _without_collection():
      if command in _READS_TEXT or (command in _MAY_READ_TEXT and given):
        _import_tensorflow()
      for own in modules:
        _import_module(own)
      name = command.replace('-', '_')
      module = importlib.import_module(f'mergejax.cli.{name}')
    module.main(options)

  trains = command in ('quickstart', 'train')
  return common.run_reporting_mistakes(run, 0 if trains else 143)
