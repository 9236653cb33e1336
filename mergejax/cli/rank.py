# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax rank MODEL... --suite FILE`: which model for which task."""

from collections.abc import Sequence
import json

from mergejax import adapters
from mergejax import models
from mergejax.adapters import changes
from mergejax.cli import common
from mergejax.core import errors
from mergejax.evaluation import base
from mergejax.evaluation import suite as suite_lib
from mergejax.select import ranking


def main(arguments: Sequence[str]) -> None:
  """Prints scores of models by tasks, and the order for each task."""
  parser = common.parser('rank', 'Rank models for tasks without training.')
  parser.add_argument(
    'checkpoints', nargs='+', help='each a checkpoint, or BASE+ADAPTER'
  )
  parser.add_argument('--suite', required=True, help='a YAML file of tasks')
  parser.add_argument('--task', action='append', help='by default all of them')
  parser.add_argument('--score', default='logme', choices=ranking.SCORES)
  parser.add_argument('--split', default='train')
  parser.add_argument('--max_examples', type=int, default=512, help='of a task')
  parser.add_argument('--json', help='also write the table to this file')
  parser.add_argument(
    '--adapters', metavar='FOLDER',
    help='a library: also the first checkpoint with each of its adapters',
  )  # fmt: skip
  options = parser.parse_args(arguments)
  if options.adapters:
    library = adapters.Library(options.adapters)
    options.checkpoints += [
      f'{options.checkpoints[0]}+{library.path / name}'
      for name in library.cards
    ]
  suite = suite_lib.load(options.suite)
  first, *others = (
    models.load_module(changes.parts(path)[0]) for path in options.checkpoints
  )
  names = options.task or list(suite.tasks)
  for path, module in zip(options.checkpoints[1:], others):
    for name in names:
      if suite.kind_for(name, module) != suite.kind_for(name, first):
        raise errors.ConfigError(
          f'{path} reads {name} otherwise than {options.checkpoints[0]}, '
          'inputs before targets or apart: rank decoder-only models by '
          'themselves.'
        )
  tasks = suite.read(options.split, names, options.max_examples, model=first)
  table = ranking.rank(
    ((path, *adapters.load_model(path)) for path in options.checkpoints),
    tasks,
    score=options.score,
  )
  print(base.to_text(table))
  for task in tasks:
    order = sorted(table, key=lambda model: -table[model][task])
    print(f'{task}: {" > ".join(order)}')
  if options.json:
    common.write_text(options.json, json.dumps(table, indent=2) + '\n')
