# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax forest ...`: experts that share a seed, kept in one folder.

They are trained by `mergejax train --gin_file=gin/runs/forest.gin`, or anywhere
else, and added.
"""

import argparse
from collections.abc import Sequence
import importlib
import itertools
import json
import pathlib

import numpy as np

from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import files
from mergejax.data import corpora
from mergejax.evaluation import expert_table
from mergejax.evaluation import forest_scores
from mergejax.experts import averages
from mergejax.experts import ensemble
from mergejax.experts import forest as forest_lib
from mergejax.experts import route
from mergejax.merging.disk import executor
from mergejax.merging.disk import planner

_ABOUT = """Keep experts that branched from one seed, add and remove them, and
use them as an output ensemble or as one model. They train by `mergejax train
--gin_file=gin/runs/forest.gin`, or anywhere: `average` writes what a new expert
may begin as."""


def main(arguments: Sequence[str]) -> None:
  """Runs one of the commands on a forest."""
  options = _parser().parse_args(arguments)
  options.run(options)


def _parser() -> argparse.ArgumentParser:
  parser = common.parser('forest', _ABOUT)
  commands = parser.add_subparsers(
    dest='command', required=True, metavar='COMMAND'
  )
  for name, (run, text, add) in _COMMANDS.items():
    one = commands.add_parser(
      name, help=text, description=text, allow_abbrev=False
    )
    if run is not _cluster:
      one.add_argument('forest', help='the folder of the forest')
    add(one)
    one.set_defaults(run=run)
  return parser


# What is on disk --------------------------------------------------------------


def _of_create(parser):
  parser.add_argument('seed', help='a checkpoint with its config.json')
  parser.add_argument('--vocabulary', default='bytes', help='or a .model file')
  parser.add_argument(
    '--steps', type=int, default=0, help='updates that the seed has had'
  )


def _create(options):
  forest = forest_lib.create(
    options.forest, options.seed, vocabulary=options.vocabulary,
    steps=options.steps,
  )  # fmt: skip
  print(f'{forest.path}: a seed, and no expert yet')


def _of_add(parser):
  parser.add_argument('name', help='of the new expert')
  parser.add_argument('checkpoint', help='with its config.json')
  parser.add_argument('--domain', help='what it knows; its name by default')
  parser.add_argument(
    '--parents', default='', metavar='NAME=WEIGHT,...',
    help='what it began as: seed=1, or a=0.3,b=0.7',
  )  # fmt: skip
  parser.add_argument('--steps', type=int, help='updates of its own')
  parser.add_argument('--data_bytes', type=int, help='of its training text')
  parser.add_argument('--vocabulary', help='it was trained with, to compare')
  parser.add_argument(
    '--statistics', action='append', default=[],
    help='a folder of `mergejax stats`, for merges that need one',
  )  # fmt: skip


def _add(options):
  forest = forest_lib.Forest(options.forest)
  data = {} if options.data_bytes is None else {'bytes': options.data_bytes}
  forest.add(
    options.name, options.checkpoint, domain=options.domain,
    parents=_numbers('--parents', options.parents),
    branched_by='given' if options.parents else 'not known',
    steps=options.steps, data=data, vocabulary=options.vocabulary,
    statistics=options.statistics,
  )  # fmt: skip
  count = len(forest.experts)
  print(f'{options.name} is one of {count} expert(s) of {forest.path}')
  if forest.priors:
    print(
      f'the priors of {errors.some(list(forest.priors))} give it 0 until they '
      'are estimated anew: `mergejax forest update`'
    )


def _remove(options):
  forest = forest_lib.Forest(options.forest)
  children = forest.remove(options.name)
  print(f'{options.name} is out of {forest.path}')
  if children:
    print(
      f'its influence stays in what branched from it: {", ".join(children)}'
    )


def _list(options):
  forest = forest_lib.Forest(options.forest)
  if options.json:
    experts = {n: one.to_json() for n, one in forest.experts.items()}
    priors = {domain: own.tolist() for domain, own in forest.priors.items()}
    found = {'seed': forest.seed, 'experts': experts, 'priors': priors}
    print(json.dumps(found, indent=2))
    return
  print(f'seed, {forest.seed["steps"]} steps, {forest.seed["fingerprint"]}')
  for name, one in forest.experts.items():
    parents = ', '.join(f'{w:.3g} {p}' for p, w in one.parents.items())
    parts = [
      f'domain {one.domain}',
      f'from {parents} ({one.branched_by})' if parents else 'origin not known',
      *([f'{one.steps} steps'] if one.steps is not None else []),
      *(f'{value} {what}' for what, value in one.data.items()),
    ]
    print(f'{name}: {"; ".join(parts)}')
  for domain, prior in forest.priors.items():
    print(f'prior of {domain}: {_shares(forest, prior)}')


def _shares(forest, prior):
  """A prior as people read it."""
  return ', '.join(f'{p:.3f} {n}' for n, p in zip(forest.experts, prior))


def _of_cluster(parser):
  parser.add_argument('text', help='a folder of documents, of any domains')
  parser.add_argument('out', help='the folder to create: corpora and router')
  parser.add_argument('--clusters', type=int, required=True)
  parser.add_argument('--seed', type=int, default=0)


def _cluster(options):
  """Writes `OUT/corpora/cluster_I/SPLIT.jsonl`, and the router of the clusters."""
  clusters = importlib.import_module('mergejax.experts.clusters')
  files.check_new(options.out)
  found = corpora.read_folder(pathlib.Path(options.text))
  labelled = itertools.chain.from_iterable(found.values())
  texts = {split: [] for split in corpora.SPLITS}
  for split, text in corpora.split_documents(labelled, set()):
    texts[split].append(text)
  fitted = clusters.fit(texts['train'], options.clusters, seed=options.seed)
  with files.atomic_path(options.out) as out:
    for split, own in texts.items():
      places = fitted.nearest(own) if own else []
      if split == 'train':
        places = fitted.assignment
      for i in range(options.clusters):
        folder = out / 'corpora' / f'cluster_{i}'
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({'text': t}) for t, k in zip(own, places) if k == i]
        (folder / f'{split}.jsonl').write_text('\n'.join(lines))
    fitted.save(out / 'router')
  sizes = ', '.join(map(str, np.bincount(fitted.assignment)))
  print(f'{options.out}: training documents of the clusters: {sizes}')


# What needs text --------------------------------------------------------------


def _of_text(parser, split, required=True):
  parser.add_argument(
    '--corpora', required=required, help='one file or folder of text a domain'
  )
  parser.add_argument('--split', default=split, help='of the text')
  parser.add_argument('--length', type=int, default=64, help='tokens a row')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument(
    '--max_sequences', type=int, default=100, help='rows a domain'
  )


def _suite(options, forest):
  # It imports seqio, which a list of experts does not need.
  corpora_suite = importlib.import_module('mergejax.cli.corpora_suite')
  return corpora_suite.opened(
    options.corpora, forest.vocabulary, options.split, length=options.length,
    batch_size=options.batch_size, max_sequences=options.max_sequences,
  )  # fmt: skip


def _priors(options, forest, suite, domains=None):
  """`{domain: prior}`, estimated on the text that was given."""
  return forest_scores.priors(
    forest, suite.read(options.split, domains),
    expert_table.Scorer(forest.module), batch_size=options.batch_size,
  )  # fmt: skip


def _update(options):
  forest = forest_lib.Forest(options.forest)
  with _suite(options, forest) as suite:
    found = _priors(options, forest, suite)
  for domain, prior in found.items():
    forest.set_prior(domain, prior)
  for domain, prior in found.items():
    print(f'{domain}: {_shares(forest, prior)}')


def _of_average(parser):
  parser.add_argument('out', help='the checkpoint to create')
  parser.add_argument(
    '--weights', default='uniform',
    help=f'{", ".join(ensemble.AVERAGES)}, one expert, or seed',
  )  # fmt: skip
  parser.add_argument('--domain', help='whose prior the weights go by')
  parser.add_argument('--top_k', type=int)
  parser.add_argument('--method', default='linear', help='any merge method')
  parser.add_argument(
    '--options', default='{}', help="of the method: '{density: 0.3}'"
  )
  _of_text(parser, 'validation', required=False)


def _average(options):
  forest = forest_lib.Forest(options.forest)
  files.check_new(options.out)
  prior = _prior_of(options, forest)
  shares = averages.weights(
    forest, options.weights, prior=prior, k=options.top_k
  )
  recipe = averages.recipe(
    forest,
    shares,
    options.method,
    **common.mapping('--options', options.options, '{density: 0.3}'),
  )
  report = executor.execute(planner.plan(recipe), options.out)
  print(report.describe())
  parents = ','.join(f'{name}={share:.6g}' for name, share in shares.items())
  print(f'began as: --parents {parents}')


def _prior_of(options, forest):
  """The prior of the domain that an average is for; None if there is none."""
  if options.weights not in ensemble.AVERAGES_BY_PRIOR:
    return None
  if options.corpora is not None:
    with _suite(options, forest) as suite:
      domain = _domain_of(options, suite.tasks, f'of {options.corpora}')
      return _priors(options, forest, suite, [domain])[domain]
  if options.domain is None:
    return None
  place = f'with a prior in {forest.path}'
  return forest.priors[_domain_of(options, forest.priors, place)]


def _domain_of(options, known, place):
  """The domain that an average is for, among those that are known."""
  if options.domain is None and len(known) == 1:
    return next(iter(known))
  if options.domain is None:
    raise errors.ConfigError(
      f'{options.corpora} has the domains {errors.some(list(known))}, and an '
      'average is for one: name it by --domain.'
    )
  if options.domain not in known:
    raise errors.ConfigError(
      errors.near(options.domain, known, f'domain {place}')
    )
  return options.domain


def _of_evaluate(parser):
  parser.add_argument(
    '--ensembles', default='uniform,updating',
    help='of uniform, simple_average, updating, cached, argmax, topk',
  )  # fmt: skip
  parser.add_argument(
    '--weights', default='uniform',
    help='averages of weights, see `mergejax forest average`',
  )  # fmt: skip
  parser.add_argument('--top_k', type=int)
  parser.add_argument(
    '--posterior', default='full_bayes', help=', '.join(ensemble.POSTERIORS)
  )
  parser.add_argument(
    '--tempering', type=float, default=1.0, help='exponent on likelihoods'
  )
  parser.add_argument(
    '--floor', type=float, default=0.0, help='least weight of an expert'
  )
  parser.add_argument('--json', help='also write the table to this file')
  parser.add_argument(
    '--router', help='of `mergejax forest cluster`: experts by context'
  )
  parser.add_argument(
    '--context', type=int, default=32, help='tokens that the router reads'
  )
  _of_text(parser, 'test')


def _router(options, forest, vocabulary):
  """Weights of the rows of batches, by their first tokens; None without one."""
  if options.router is None:
    return None
  clusters = importlib.import_module('mergejax.experts.clusters')
  router = route.Router(clusters.load(options.router), top_k=options.top_k)
  names = list(forest.experts)
  wanted = [f'cluster_{i}' for i in range(router.clusters.count)]
  if sorted(names) != sorted(wanted):
    raise errors.ConfigError(
      f'The router has {len(wanted)} clusters, cluster_0 and so on, and '
      f'{forest.path} the experts {errors.some(names)}: grow the forest on the '
      'corpora beside the router.'
    )
  order = [wanted.index(name) for name in names]

  texts = importlib.import_module('mergejax.evaluation.texts')

  def weights(batches):
    rows = np.concatenate([b['decoder_target_tokens'] for b in batches])
    told = [texts.decoded(vocabulary, row[: options.context]) for row in rows]
    return router.weights(told)[:, order]

  return weights


def _evaluate(options):
  forest = forest_lib.Forest(options.forest)
  how = ensemble.Posterior(options.posterior, options.tempering, options.floor)
  errors.check_whole('--context', options.context)
  ensembles, weights = _words(options.ensembles), _words(options.weights)
  if (
    options.top_k is not None
    and options.router is None
    and 'topk' not in (*ensembles, *weights)
  ):
    raise errors.ConfigError(
      "--top_k is for 'topk' among --ensembles or --weights, and for --router: "
      'here it would change nothing.'
    )
  with _suite(options, forest) as suite:
    found = forest_scores.table(
      forest, suite.read(options.split),
      ensembles=ensembles, weights=weights, k=options.top_k,
      batch_size=options.batch_size, posterior=how,
      router=_router(options, forest, suite.vocabulary),
      context=options.context,
    )  # fmt: skip
  print('bits per byte, lower is better')
  print(found.to_text())
  if options.json:
    data = found.to_json(tasks='domains', value='bits_per_byte')
    common.write_text(options.json, json.dumps(data, indent=2) + '\n')


# Words of the command line ----------------------------------------------------


def _words(text: str) -> list[str]:
  return [word.strip() for word in text.split(',') if word.strip()]


def _numbers(flag: str, text: str) -> dict[str, float]:
  """`a=0.3,b=0.7` as numbers by name."""
  found = {}
  for word in _words(text):
    name, _, number = word.partition('=')
    try:
      found[name] = float(number)
    except ValueError:
      raise errors.ConfigError(
        f'{flag} is a list such as seed=1 or a=0.3,b=0.7, not {text!r}.'
      ) from None
  return found


_NAMED = lambda parser: parser.add_argument('name', help='of the expert')
_COMMANDS = {
  'create': (_create, 'a forest of a seed alone', _of_create),
  'add': (_add, 'a trained checkpoint as an expert', _of_add),
  'remove': (_remove, 'an expert with its files; tells its children', _NAMED),
  'list': (
    _list, 'experts, parents, data and priors',
    lambda parser: parser.add_argument('--json', action='store_true'),
  ),
  'update': (
    _update, 'estimate the prior of every domain on held-out text',
    lambda parser: _of_text(parser, 'validation'),
  ),
  'average': (
    _average, 'one model of the experts, or what a branch begins as',
    _of_average,
  ),
  'cluster': (
    _cluster, 'text without labels in clusters, to grow a forest on',
    _of_cluster,
  ),
  'evaluate': (
    _evaluate, 'experts, ensembles and averages, by domain', _of_evaluate,
  ),
}  # fmt: skip
