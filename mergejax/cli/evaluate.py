# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax evaluate MODEL...`: a table of models by tasks or domains.

With `--gin_file`, as T5X's `eval.py`: see gin/runs/eval.gin.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax

from mergejax import models
from mergejax.cli import common
from mergejax.cli import corpora_suite
from mergejax.cli import gin_run
from mergejax.cli import loaded
from mergejax.core import errors
from mergejax.data import corpora
from mergejax.evaluation import base
from mergejax.evaluation import decode
from mergejax.evaluation import plots
from mergejax.evaluation import recipes
from mergejax.evaluation import scoring
from mergejax.evaluation import suite as suite_lib
from mergejax.training import peers


def main(arguments: Sequence[str]) -> None:
  """Prints a table of models by the tasks of a suite, or by domains."""
  if gin_run.is_asked(arguments):
    about = 'Score a model on a mixture, as gin files describe.'
    gin_run.run('evaluate', about, evaluate_models, arguments)
    return
  parser = common.parser(
    'evaluate',
    'Score models on tasks or corpora. Or as T5X does, from gin files: '
    '--gin_file=gin/runs/eval.gin --gin.NAME=VALUE.',
  )
  parser.add_argument(
    'checkpoints', nargs='*', help='checkpoints, and merge recipes (.yaml)'
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--corpora', help='one domain an entry')
  source.add_argument('--suite', help='a YAML file of tasks')
  parser.add_argument('--vocabulary', default='bytes', help='or a .model file')
  parser.add_argument('--split', default='test', choices=corpora.SPLITS)
  parser.add_argument('--length', type=int, default=64, help='tokens a row')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument(
    '--max_sequences', type=int, default=256, help='rows a domain'
  )
  parser.add_argument('--json', help='also write the table to this file')
  parser.add_argument('--plot', help='also draw the table into this PNG')
  parser.add_argument(
    '--plot_kind', default='heatmap', choices=tuple(plots.KINDS)
  )
  options = parser.parse_args(arguments)
  table, data = _on_suite(options) if options.suite else _on_corpora(options)
  if options.json:
    common.write_text(options.json, json.dumps(data, indent=2) + '\n')
  if options.plot:
    plots.table(table, options.plot, options.plot_kind)


def _on_suite(options):
  """`(table, its numbers for --json)`."""
  suite = suite_lib.load(options.suite)
  experts = {n: t.expert for n, t in suite.tasks.items() if t.expert}
  first = [suite.base] if suite.base else []
  paths = list(dict.fromkeys([*first, *experts.values(), *options.checkpoints]))
  if not paths:
    raise errors.ConfigError(
      'Nothing to evaluate: name checkpoints or recipes, or give the suite a '
      '`base` or an `expert`.'
    )
  return evaluate_models(checkpoints=paths, suite=suite, split=options.split)


def evaluate_models(
  *,
  checkpoints: Sequence[os.PathLike | str],
  suite: scoring.Suite,
  split: str = 'test',
  module: nn.Module | models.ModelFamily | None = None,
  restore_step: int | None = None,
  dtype: str = 'float32',
  mesh: Mapping[str, int] | None = None,
  output_dir: os.PathLike | str | None = None,
) -> tuple[base.Table, dict[str, Any]]:
  """Scores models on a suite, and prints the table.

  Args:
    checkpoints: of any format, folders of runs, and recipes.
    suite: from `suite.load`, or `@suite.of_mixture()` in gin.
    split: which examples.
    module: of checkpoints that do not say what they are of, see `loaded.load`.
    restore_step: of a run's folder; its last by default.
    dtype: 'bfloat16' rounds the parameters to it.
    mesh: sizes for `partition.make_mesh`; the first device by default, or all
      of several processes, each of which must call this.
    output_dir: where to write the table too, as `scores.json`.

  Returns:
    `(table, its numbers as plain data)`: `raw`, and `normalised` by the score
    of each task's own expert where it has one.

  Raises:
    UserError: see `loaded.load` and `Suite.table`.
  """
  for path in checkpoints:
    of_text = [t.source for t in suite.tasks.values() if t.kind != 'images']
    loaded.check_vocabulary(path, of_text)
  alone = jax.process_count() == 1
  devices = None if mesh is None and alone else loaded.mesh_of(mesh)
  how: dict[str, Any] = dict(module=module, step=restore_step, dtype=dtype)
  rows = (
    (os.fspath(path), *loaded.load(path, mesh=devices, **how))
    for path in checkpoints
  )
  with _watching(output_dir):
    table = suite.table(rows, split, mesh=devices)
  data: dict[str, Any] = {'raw': table.to_json()}
  text = [suite.describe_metrics(), table.to_text()]
  if any(task.expert for task in suite.tasks.values()):
    shares = table.normalised(suite.experts(table))
    text += ["\nover the score of each task's own expert; more is better"]
    text += [shares.to_text()]
    data['normalised'] = shares.to_json()
  if jax.process_index() == 0:
    print('\n'.join(text))
    if output_dir is not None:
      file = pathlib.Path(output_dir) / 'scores.json'
      common.write_text(file, json.dumps(data, indent=2) + '\n')
  return table, data


def _watching(folder):
  """Processes that work together watch each other, if they share a folder."""
  if folder is None:
    return contextlib.nullcontext()
  return peers.watching(pathlib.Path(folder))


def _on_corpora(options):
  """`(table, its numbers for --json)`, in bits per byte."""
  if not options.checkpoints:
    raise errors.ConfigError(
      'Nothing to evaluate: name checkpoints or recipes.'
    )
  loaded = {}
  for path in options.checkpoints:
    loaded[path] = recipes.load(path)
    if not decode.is_decoder_only(models.family_of(loaded[path][0])):
      raise errors.CheckpointError(f'{path} is not a language model.')
  with corpora_suite.opened(
    options.corpora, options.vocabulary, options.split,
    length=options.length, batch_size=options.batch_size,
    max_sequences=options.max_sequences,
  ) as suite:  # fmt: skip
    table = suite.table(
      ((path, *model) for path, model in loaded.items()), options.split
    )
  print(suite.describe_metrics())
  print(table.to_text())
  return table, table.to_json(tasks='domains', value='bits_per_byte')
