# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax moe ...`: sparse models of dense ones, and back.

What comes out is a checkpoint like any other: `mergejax train
--gin_file=gin/runs/language_model.gin --gin_file=gin/models/of_checkpoint.gin
--gin.INITIAL_CHECKPOINT=OUT` trains it on.
"""

import argparse
from collections.abc import Sequence
import importlib
import itertools
import json
import pathlib

import jax
import numpy as np

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.cli import loaded
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.experts import averages
from mergejax.experts import sparse_layers
from mergejax.experts import to_dense
from mergejax.experts import upcycle
from mergejax.experts import usage as usage_lib
from mergejax.models import architectures
from mergejax.nn import moe_config
from mergejax.training import routing_pictures

_ABOUT = """Make a sparse model of a dense one or of several, a dense one of a
sparse one, or one with fewer experts. Settings are those of `moe` in a
config.json and of moe_config.MoeConfig in gin."""
# Weights that sum to 1, so that equal experts make the dense function.
_SETTINGS = '{top_k: 2, normalize_gates: true}'


def main(arguments: Sequence[str]) -> None:
  """Runs one of the commands."""
  options = _parser().parse_args(arguments)
  if hasattr(options, 'out'):
    _check_out(options.out)
  options.run(options)


def _parser() -> argparse.ArgumentParser:
  parser = common.parser('moe', _ABOUT)
  commands = parser.add_subparsers(
    dest='command', required=True, metavar='COMMAND'
  )
  for name, (run, text, add) in _COMMANDS.items():
    one = commands.add_parser(
      name, help=text, description=text, allow_abbrev=False
    )
    add(one)
    one.set_defaults(run=run)
  return parser


# Dense to sparse --------------------------------------------------------------


def _of_upcycle(parser):
  parser.add_argument('model', help='a dense checkpoint with its config.json')
  parser.add_argument('out', help='the checkpoint to create')
  parser.add_argument(
    '--moe', required=True,
    help="settings: '{num_experts: 8, top_k: 2, normalize_gates: true}'",
  )  # fmt: skip
  parser.add_argument('--seed', type=int, default=0, help='of the routers')


def _upcycle(options):
  fields = common.mapping('--moe', options.moe, '{num_experts: 8}')
  config = moe_config.from_fields(fields)
  _check_dense(options.model, config)
  family, params = upcycle.upcycle(
    *models.load_model(options.model), config, key=jax.random.key(options.seed)
  )
  _save(options.out, family, params)
  print(
    'it is the function of the dense model where nothing is dropped'
    if config.sums_to_one(True) and config.sums_to_one(False)
    else 'the weights of a token do not sum to 1, so that the loss jumps at '
    'first: normalize_gates: true keeps the function'
  )


def _of_mix(parser):
  parser.add_argument(
    'models', nargs='+', metavar='MODEL',
    help='dense checkpoints that branched from one seed, or their forest',
  )  # fmt: skip
  parser.add_argument('out', help='the checkpoint to create')
  parser.add_argument(
    '--moe', default=_SETTINGS,
    help=f'settings; {_SETTINGS} by default, as in Branch-Train-MiX, where all '
    'layers are sparse: decoder_layers',
  )  # fmt: skip
  parser.add_argument('--seed', type=int, default=0, help='of the routers')


def _mix(options):
  paths = list(itertools.chain.from_iterable(map(_experts, options.models)))
  fields = common.mapping('--moe', options.moe, _SETTINGS)
  config = moe_config.from_fields({'num_experts': len(paths), **fields})
  _check_dense(paths[0], config)
  for remark in architectures.check_checkpoints(
    paths, 'They cannot be experts of one model.'
  ):
    print(remark)
  family, params = upcycle.branch_train_mix(
    models.load_module(paths[0]),
    [models.load_model(path)[1] for path in paths],
    config,
    key=jax.random.key(options.seed),
  )
  _save(options.out, family, params)


def _experts(path):
  """Checkpoints of the experts of a forest, or the checkpoint itself."""
  forest = loaded.forest_at(path)
  if forest is None:
    return [path]
  names = forest.names()
  averages.check_lineage(forest, names)
  return [forest.model(name) for name in names]


def _check_dense(path, config):
  """Raises for what is wrong with the new model, before a weight is read."""
  dense = sparse_layers.family_of(models.load_module(path), sparse=False)
  sparse_layers.with_moe(dense, config).specs()


# Sparse to dense, or to fewer experts -----------------------------------------


def _of_dense(parser):
  _sparse(parser)
  parser.add_argument(
    '--how', default=to_dense.MEAN, choices=to_dense.HOW,
    help='mean takes upcycling back; load weighs experts by their use, argmax '
    'keeps the most used one; fresh draws blocks anew, for a student of '
    'distillation',
  )  # fmt: skip
  parser.add_argument(
    '--align', action='store_true',
    help='experts that were not born from one: match their hidden units first',
  )  # fmt: skip
  parser.add_argument('--seed', type=int, default=0, help='of fresh blocks')
  _of_text(parser, required=False)


def _dense(options):
  family = _check_sparse(options.model)
  given = options.corpora or options.suite
  if options.how == to_dense.FRESH and (options.align or given):
    raise errors.ConfigError(
      '--how fresh has nothing of the experts: leave --align, --corpora and '
      '--suite out.'
    )
  if options.how in to_dense.BY_USAGE and not given:
    raise errors.ConfigError(
      f'--how {options.how} must know how much experts are used: give text by '
      '--corpora or --suite.'
    )
  params = models.load_model(options.model)[1]
  found = _measured(options, family, params) if given else None
  dense, params = to_dense.to_dense(
    family, params, how=options.how, usage=found, align=options.align,
    key=jax.random.key(options.seed),
  )  # fmt: skip
  _save(options.out, dense, params)


def _of_fewer(parser):
  _sparse(parser)
  parser.add_argument(
    '--experts', type=int, required=True, help='that are left in every layer'
  )
  parser.add_argument(
    '--how', default=usage_lib.MERGE, choices=usage_lib.HOW,
    help='merge averages the others into those that are left, prune forgets '
    'them',
  )  # fmt: skip
  _of_text(parser)


def _fewer(options):
  family = _check_sparse(options.model)
  usage_lib.with_experts(family, options.experts)
  params = models.load_model(options.model)[1]
  found = _measured(options, family, params)
  _save(
    options.out,
    *usage_lib.fewer(family, params, options.experts, found, how=options.how),
  )


def _of_match(parser):
  parser.add_argument(
    'reference', help='a sparse checkpoint whose order counts'
  )
  _sparse(parser)


def _match(options):
  family = _check_sparse(options.model)
  reference = _check_sparse(options.reference)
  if family.config != reference.config:
    architectures.check_checkpoints(
      [options.reference, options.model],
      'Experts of one cannot be matched to experts of the other.',
    )
  params = usage_lib.matched(
    family, *(models.load_model(p)[1] for p in (options.reference, options.model))
  )  # fmt: skip
  _save(options.out, family, params)


# How much experts are used ----------------------------------------------------


def _of_usage(parser):
  parser.add_argument('model', help='a sparse checkpoint')
  parser.add_argument('--json', help='also write the numbers to this file')
  parser.add_argument('--plot', help='also draw the loads into this PNG')
  _of_text(parser)


def _usage(options):
  family = _check_sparse(options.model)
  params = models.load_model(options.model)[1]
  found = _measured(options, family, params)
  for layer, one in found.items():
    shares = ' '.join(f'{share:.3f}' for share in one.load)
    print(
      f'{layer}: {shares}; of a token {one.experts:.2f} experts, of weight '
      f'{one.gate:.3f}'
    )
  if options.json:
    data = {
      layer: {**one._asdict(), 'load': one.load.tolist()}
      for layer, one in found.items()
    }
    common.write_text(options.json, json.dumps(data, indent=2) + '\n')
  if options.plot:
    loads = np.stack([one.load for one in found.values()])
    routing_pictures.draw(loads, list(found), options.plot)


def _of_text(parser, required=True):
  source = parser.add_mutually_exclusive_group(required=required)
  source.add_argument('--corpora', help='one file or folder of text a domain')
  source.add_argument('--suite', help='a YAML file of tasks')
  parser.add_argument('--split', default='validation', help='of the text')
  for name, value, text in (
    ('vocabulary', 'bytes', 'of the corpora, or a .model file'),
    ('length', 64, 'tokens a row'),
    ('batch_size', 32, 'of the corpora'),
    ('max_sequences', 256, 'rows a domain'),
  ):
    parser.add_argument(
      f'--{name}', type=type(value), default=value, help=text
    )  # fmt: skip


def _measured(options, family, params):
  """`{layer: usage}` on the text that was given."""
  # They import seqio, which takes seconds.
  if options.suite:
    suite_lib = importlib.import_module('mergejax.evaluation.suite')
    suite = suite_lib.load(options.suite)
    found = suite.read(options.split, model=family)
    return usage_lib.measure(family, params, _joined(found))
  if family.answers:
    raise errors.ConfigError(
      f'{options.model} answers to inputs, and --corpora are text without: give '
      'tasks by --suite.'
    )
  corpora_suite = importlib.import_module('mergejax.cli.corpora_suite')
  with corpora_suite.opened(
    options.corpora, options.vocabulary, options.split, length=options.length,
    batch_size=options.batch_size, max_sequences=options.max_sequences,
  ) as suite:  # fmt: skip
    return usage_lib.measure(family, params, _joined(suite.read(options.split)))


def _joined(sets):
  return itertools.chain.from_iterable(sets.values())


# Checkpoints ------------------------------------------------------------------


def _sparse(parser):
  parser.add_argument('model', help='a sparse checkpoint')
  parser.add_argument('out', help='the checkpoint to create')


def _check_sparse(path):
  """The family of a sparse checkpoint; no weight is read.

  Raises:
    UserError: it is none.
  """
  return sparse_layers.family_of(models.load_module(path), sparse=True)


def _check_out(out):
  files.check_new(out)
  if pathlib.Path(out).suffix in ('.safetensors', '.npz'):
    raise errors.ConfigError(
      f'{out} is a single file and has no place for config.json, which says how '
      'many experts there are: give a directory name instead.'
    )


def _save(out, family, params):
  checkpoint.save_checkpoint(out, params, config=models.describe(family))
  count = sum(leaf.size for leaf in tree.flatten(params).values())
  text = f'{out}: {count:,} parameters'
  if family.config.moe is not None:
    layers = sparse_layers.layers(sparse_layers.unstacked(family, params))
    text += (
      f', {len(layers)} sparse layer(s) of {family.config.moe.num_experts} '
      'experts'
    )
  print(text)


_COMMANDS = {
  'upcycle': (_upcycle, 'every expert a copy of the dense block', _of_upcycle),
  'mix': (_mix, 'Branch-Train-MiX: dense models become experts', _of_mix),
  'dense': (_dense, 'one block of the experts of every layer', _of_dense),
  'fewer': (_fewer, 'the most used experts of every layer', _of_fewer),
  'match': (
    _match, 'experts in the order of another model, to merge the two', _of_match,
  ),
  'usage': (_usage, 'how much each expert is used', _of_usage),
}  # fmt: skip
