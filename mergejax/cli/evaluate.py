# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax evaluate MODEL...`: a table of models by tasks or domains."""

from collections.abc import Sequence
import json
import pathlib
import tempfile

from mergejax import models
from mergejax.cli import common
from mergejax.core import errors
from mergejax.data import corpora
from mergejax.data import features
from mergejax.data import tasks
from mergejax.evaluation import decode
from mergejax.evaluation import plots
from mergejax.evaluation import recipes
from mergejax.evaluation import suite as suite_lib


def main(arguments: Sequence[str]) -> None:
  """Prints a table of models by the tasks of a suite, or by domains."""
  parser = common.parser('evaluate', 'Score models on tasks or corpora.')
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
  rows = ((path, *recipes.load(path)) for path in paths)
  table = suite.table(rows, options.split)
  print(suite.describe_metrics())
  print(table.to_text())
  data = {'raw': table.to_json()}
  if experts:
    shares = table.normalised(suite.experts(table))
    print("\nover the score of each task's own expert; more is better")
    print(shares.to_text())
    data['normalised'] = shares.to_json()
  return table, data


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
  vocabulary = features.vocabulary(options.vocabulary)
  with tempfile.TemporaryDirectory() as folder:
    sizes = corpora.write_splits(
      corpora.read_folder(tasks.locate(options.corpora)), pathlib.Path(folder)
    )
    corpora.check_sizes(sizes, {options.split: 1})
    suite = suite_lib.of_corpora(
      tasks.add_corpora(folder, vocabulary),
      length=options.length,
      batch_size=options.batch_size,
      max_sequences=options.max_sequences,
      vocabulary=vocabulary,
    )
    table = suite.table(
      ((path, *model) for path, model in loaded.items()), options.split
    )
  print(suite.describe_metrics())
  print(table.to_text())
  return table, table.to_json(tasks='domains', value='bits_per_byte')
