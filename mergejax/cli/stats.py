# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax stats gram|fisher|norms|survey`: what data-based merges look at.

`mergejax stats package.module:function MODEL OUT` collects a statistic of your
own: what the function, called without arguments, returns.
"""

from collections.abc import Sequence
import importlib
import json
import sys

import numpy as np

from mergejax import models
from mergejax import partition
from mergejax import statistics
from mergejax.analysis import norms
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import registry
from mergejax.models import architectures
from mergejax.models import batch_norm


def main(arguments: Sequence[str]) -> None:
  """Collects statistics of one model, or surveys several."""
  parser = common.parser('stats', 'Collect statistics for merges.')
  kinds = parser.add_subparsers(dest='kind', required=True)
  for kind, text in (
    ('gram', 'Gram matrices of the inputs of linear maps, for regmean'),
    ('fisher', 'the diagonal Fisher information, for fisher'),
  ):
    one = kinds.add_parser(kind, help=text)
    _add_data(one)
    _add_devices(one)
    one.add_argument('--exclude', action='append', default=[])
    if kind == 'gram':
      one.add_argument('--include', action='append')
      one.add_argument('--conv', action='store_true')
      one.add_argument('--tied_head', action='store_true')
    else:
      one.add_argument(
        '--estimator', help='exact, sampled or empirical; by default exact for '
        'classifiers and sampled for text',
      )  # fmt: skip
      one.add_argument('--samples', type=int, default=1)
      one.add_argument('--seed', type=int, default=0)
  own = arguments[0] if arguments else ''
  if registry.is_import_path(own):
    one = kinds.add_parser(own, help='a statistic of your own')
    _add_data(one)
    _add_devices(one)
  again = kinds.add_parser(
    'norms', help='running statistics of batch norms, measured anew'
  )
  _add_data(again)
  survey = kinds.add_parser(
    'survey', help='sizes, signs, angles of task vectors'
  )
  survey.add_argument('base')
  survey.add_argument('models', nargs='+')
  survey.add_argument('--json', help='also write the rows to this file')
  survey.add_argument('--plot', help='also draw them into this PNG')
  options = parser.parse_args(arguments)
  {'survey': _survey, 'norms': _norms}.get(options.kind, _collect)(options)


def _add_data(parser):
  """A model, what to create, and the data to look at."""
  parser.add_argument('model', help='a checkpoint with its config.json')
  parser.add_argument('out', help='the directory to create')
  parser.add_argument('--suite', required=True, help='a YAML file of tasks')
  parser.add_argument('--task', action='append', help='by default all of them')
  parser.add_argument('--split', default='train')
  parser.add_argument(
    '--max_examples', type=int, default=4096, help='of a task'
  )


def _add_devices(parser):
  parser.add_argument('--data', type=int, default=1, help='devices for rows')
  parser.add_argument('--model_parallel', type=int, default=1)


def _batches(options, module):
  """`{task: batches}`, as the model takes them."""
  # Imports seqio, which takes seconds.
  suite_lib = importlib.import_module('mergejax.evaluation.suite')
  suite = suite_lib.load(options.suite)
  return suite.read(
    options.split, options.task, options.max_examples, model=module
  )


def _survey(options):
  for remark in architectures.check_checkpoints(
    [options.base, *options.models], 'Their differences mean nothing.'
  ):
    print(remark)
  found = statistics.survey(
    [checkpoint.open_weights(path) for path in options.models],
    checkpoint.open_weights(options.base),
  )
  print(found.to_text())
  if options.json:
    common.write_text(
      options.json, json.dumps(found.to_rows(), indent=2) + '\n'
    )
  if options.plot:
    plots = importlib.import_module('mergejax.evaluation.plots')
    plots.norms(found.to_rows()[:-1], options.plot)


def _norms(options):
  files.check_new(options.out)
  module, params = models.load_model(options.model)
  if batch_norm.COLLECTION not in params:
    raise errors.CheckpointError(
      f'{options.model} has no batch norms, so nothing has to be measured anew.'
    )
  by_task = _batches(options, module)
  batches = [batch for several in by_task.values() for batch in several]
  params = norms.refresh_norms(module, params, batches)
  checkpoint.save_checkpoint(
    options.out, params, config=models.describe(module),
    axes=models.axes(options.model) or None,
  )  # fmt: skip
  print(
    f'running statistics over {len(batches)} batches of {", ".join(by_task)}: '
    f'{options.out}'
  )


def _collect(options):
  models.check_not_converted(options.model)
  module, params = models.load_model(options.model)
  by_task = _batches(options, module)
  batches = [batch for several in by_task.values() for batch in several]
  if registry.is_import_path(options.kind):
    statistic = registry.imported(options.kind, 'statistic')()
  elif options.kind == 'gram':
    statistic = statistics.gram(
      include=options.include, exclude=options.exclude, conv=options.conv,
      tied_head=options.tied_head,
    )  # fmt: skip
  else:
    if options.exclude:
      raise errors.ConfigError(
        '--exclude is for gram: a Fisher has every leaf.'
      )
    classes = np.ndim(models.family_of(module).targets(batches[0])) == 1
    default = 'exact' if classes else 'sampled'
    statistic = statistics.fisher(
      estimator=options.estimator or default, samples=options.samples,
      seed=options.seed,
    )  # fmt: skip
  mesh = None
  if options.data * options.model_parallel > 1:
    mesh = partition.make_mesh(data=options.data, model=options.model_parallel)

  def progress(done):
    if sys.stderr.isatty():
      print(f'\r{done} of {len(batches)} batches', end='', file=sys.stderr)
    elif done % 64 == 0 or done == len(batches):
      print(f'{done} of {len(batches)} batches', file=sys.stderr)

  found = statistics.collect(
    statistic, module, params, batches, mesh=mesh, out=options.out,
    progress=progress,
  )  # fmt: skip
  print(
    f'{options.kind} of {len(found)} parameters over {len(batches)} batches of '
    f'{", ".join(by_task)}: {options.out}'
  )
