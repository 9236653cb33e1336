# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax merge RECIPE OUT`: merges checkpoints without loading them."""

from collections.abc import Iterator, Sequence
import importlib
import pathlib
import sys
from typing import Any

import yaml

from mergejax.checkpoints import shards
from mergejax.cli import common
from mergejax.core import checksums
from mergejax.core import errors


def main(arguments: Sequence[str]) -> None:
  """Plans, prints the plan, and runs it; continues what was interrupted."""
  parser = common.parser('merge', 'Merge checkpoints as a recipe says.')
  parser.add_argument('recipe', help='a YAML file; mergekit files work')
  parser.add_argument('out', help='what to create')
  parser.add_argument(
    '--dry_run', action='store_true', help='check and print, merge nothing'
  )
  parser.add_argument(
    '--format',
    help='of the result: safetensors, orbax, t5x or npz; or adapter, where the '
    'models are adapters',
  )
  parser.add_argument(
    '--max_shard_size', type=float, default=5.0, metavar='GB',
    help='of the files of a safetensors directory',
  )  # fmt: skip
  parser.add_argument(
    '--sandbox', metavar='DIR', help='refuse recipes that name paths outside'
  )
  parser.add_argument(
    '--restart', action='store_true',
    help='start afresh instead of continuing an interrupted merge',
  )  # fmt: skip
  _add_processes(parser)
  options = parser.parse_args(arguments)
  by_hand = (
    options.coordinator_address, options.process_count, options.process_index
  )  # fmt: skip
  together = options.multiprocess or by_hand != (None, None, None)
  if not (options.dry_run or together) and options.sandbox is None:
    checksums.SUMS.start(_likely_sources(options.recipe))
  # These import JAX, meanwhile.
  processes = importlib.import_module('mergejax.merging.disk.processes')
  if options.dry_run or not together:
    _merge(options, processes.Group())
    return
  meeting = importlib.import_module('mergejax.merging.disk.meeting')
  try:
    with meeting.join(*by_hand) as group:
      _merge(options, group)
  except processes.Lost as lost:
    print(
      f'mergejax: {str(lost).rstrip(".")}. So this process ends too, and '
      f'{options.out} is not complete. Start all processes again with the same '
      'command: the merge continues with what each of them has done.',
      file=sys.stderr,
    )
    sys.exit(1)


def _add_processes(parser):
  """The flags that `mergejax train` has for runs of several processes."""
  parser.add_argument(
    '--multiprocess', action='store_true',
    help='do it together with the processes that the environment tells of (a '
    'TPU pod, Slurm), started by the same command: each reads and writes its '
    'share, on a file system that all see',
  )  # fmt: skip
  parser.add_argument(
    '--coordinator_address', help='host:port, to join by hand'
  )
  parser.add_argument('--process_count', type=int)
  parser.add_argument('--process_index', type=int)


def _merge(options, group):
  """Plans and merges as one of a group of processes, of which the first talks."""
  recipe_lib = importlib.import_module('mergejax.merging.recipes.recipe')
  planner = importlib.import_module('mergejax.merging.disk.planner')
  executor = importlib.import_module('mergejax.merging.disk.executor')
  shares = importlib.import_module('mergejax.merging.disk.shares')
  recipe = recipe_lib.load_recipe(
    options.recipe, imports=options.sandbox is None
  )
  if options.format == recipe_lib.ADAPTER != recipe.format:
    # What is read depends on it.
    data = {**recipe.data, 'format': options.format}
    recipe = recipe_lib.parse_recipe(data, imports=options.sandbox is None)
  plan = planner.plan(recipe, sandbox=options.sandbox)
  talks = group.index == 0
  count = group.count
  if options.dry_run and options.process_count:
    count = options.process_count
  form = executor.result_format(plan, pathlib.Path(options.out), options.format)
  if count > 1:
    executor.check_divisible(plan, form)
  if talks:
    print(plan.describe(), flush=True)
  if talks and count > 1:
    print(shares.describe(plan, count), flush=True)
  elif form != 'safetensors' and talks:
    print(
      f'note      {form} is written from memory at the end, which holds '
      f'another {plan.write_bytes / 1e6:,.1f} MB'
    )
  if options.dry_run:
    return
  try:
    report = executor.execute(
      plan,
      options.out,
      format=options.format,
      resume=not options.restart,
      max_shard_bytes=int(options.max_shard_size * 1e9),
      progress=_Progress() if talks else None,
      group=group,
    )
  except (errors.Stopped, KeyboardInterrupt) as stop:
    # What another process was asked for, it says here.
    said = f'{stop}: stopped' if str(stop).startswith('Process') else 'stopped'
    print(
      f'mergejax: {said}; {options.out} is not complete. The same command '
      'continues.',
      file=sys.stderr,
    )
    group.close(stop)
    signal_number = 2 if isinstance(stop, KeyboardInterrupt) else 15
    sys.exit(128 + signal_number)
  if talks:
    print(report.describe())


class _Progress:
  """A line that renews itself on a terminal, one line a tenth elsewhere."""

  def __init__(self):
    self._tenth = 0

  def __call__(self, done: int, total: int) -> None:
    share = done / max(total, 1)
    if sys.stderr.isatty():
      end = '\n' if done == total else ''
      print(f'\rmerged {share:6.1%}', end=end, file=sys.stderr, flush=True)
    elif int(share * 10) > self._tenth:
      self._tenth = int(share * 10)
      print(f'merged {share:.0%}', file=sys.stderr, flush=True)


def _likely_sources(recipe: str) -> list[pathlib.Path]:
  """Files of the models that a recipe names, as far as a glance tells.

  Only a head start: the plan decides, and says what is wrong.
  """
  try:
    data = yaml.safe_load(pathlib.Path(recipe).read_text(encoding='utf-8'))
    folders = dict.fromkeys(pathlib.Path(n).expanduser() for n in _names(data))
    folders = [folder for folder in folders if shards.is_here(folder)]
    return [file for folder in folders for file in shards.choose(folder).files]
  except (OSError, ValueError, yaml.YAMLError, RecursionError):
    return []


def _names(node: Any) -> Iterator[str]:
  """Every text below `model`, `models` or `base_model`."""
  if isinstance(node, list):
    for one in node:
      yield from [one] if isinstance(one, str) else _names(one)
  elif isinstance(node, dict):
    for key in ('base_model', 'model', 'models', 'slices', 'sources'):
      if isinstance(node.get(key), str):
        yield node[key]
      else:
        yield from _names(node.get(key))
