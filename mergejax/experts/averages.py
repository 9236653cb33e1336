# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One model of the experts of a forest: which weights, and which merge.

    prior = forest.prior('law')
    weights = averages.weights(forest, 'posterior', prior=prior)
    params = averages.average(forest, weights)

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306, for averages by the posterior, also as what a
new expert begins as.
"""

from collections.abc import Mapping, Sequence
import logging
from typing import Any

from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import ensemble
from mergejax.experts import forest as forest_lib
from mergejax.experts import records
from mergejax.merging import api
from mergejax.methods import named
from mergejax.statistics import saved


def weights(
  forest: forest_lib.Forest,
  kind: str,
  *,
  prior: typing.Array | None = None,
  k: int | None = None,
) -> dict[str, float]:
  """`{expert: weight}` of an average; experts of weight 0 are left out.

  Args:
    forest: of the experts.
    kind: see `ensemble.average_weights`, or the name of one expert or of the
      seed, which is then taken alone.
    prior: `[K]` of the domain that the average is for; not needed for
      `'uniform'`.
    k: for `'topk'`.

  Raises:
    ConfigError: an unknown kind; a kind that needs a prior, and none.
  """
  names = list(forest.experts)
  if kind in (records.SEED, *names):
    return {kind: 1.0}
  if kind not in ensemble.AVERAGES:
    known = (*ensemble.AVERAGES, records.SEED, *names)
    raise errors.ConfigError(errors.near(kind, known, 'kind of average'))
  if not names:
    raise errors.ConfigError(
      f'{forest.path} has no expert yet: {records.SEED!r} is all there is.'
    )
  if prior is None:
    if kind != 'uniform':
      raise errors.ConfigError(
        f'The average {kind!r} goes by the prior of a domain, and none is '
        'known: estimate one on its held-out text (`mergejax forest update`).'
      )
    prior = ensemble.uniform_prior(len(names))
  found = ensemble.average_weights(
    ensemble.check_prior(prior, len(names)), kind, k=k
  )
  return {n: float(w) for n, w in zip(names, found) if w > 0}


def average(
  forest: forest_lib.Forest,
  shares: Mapping[str, float],
  method: str = 'linear',
  **options: Any,
) -> typing.Tree:
  """One model of several experts, in memory, leaf by leaf in float32.

  Args:
    forest: of the experts.
    shares: `{expert or 'seed': weight}`, from `weights`.
    method: any of the menu; those on differences have the seed for a base,
      those on statistics read what lies beside every expert.
    **options: of the method.

  Raises:
    UserError: an expert that is not there; see `mj.merge`.
  """
  check_lineage(forest, list(shares))
  paths = [forest.model(name) for name in shares]
  given = _beside(forest, list(shares), method, options)
  return api.merge(
    paths, method, weights=list(shares.values()), **given, **options
  )


def recipe(
  forest: forest_lib.Forest,
  shares: Mapping[str, float],
  method: str = 'linear',
  **options: Any,
) -> dict[str, Any]:
  """The same average as a recipe, for `mj.plan`: out of core, resumable.

  Args:
    forest: of the experts.
    shares: as of `average`.
    method: likewise.
    **options: likewise, by the names of Python.

  Raises:
    UserError: likewise.
  """
  check_lineage(forest, list(shares))
  given = _beside(forest, list(shares), method, options)
  entry = named.entry_of(method)
  words: dict[str, Any] = {
    'merge_method': method,
    'models': [
      {'model': str(forest.model(name)), 'parameters': {'weight': weight}}
      for name, weight in shares.items()
    ],
    'parameters': {
      entry.recipe_name(name): value for name, value in options.items()
    },
  }
  if 'base' in given:
    words['base_model'] = str(given['base'])
  if 'stats' in given:
    words['stats'] = [str(path) for path in given['stats']]
  return words


def check_lineage(forest: forest_lib.Forest, names: Sequence[str]) -> None:
  """Warns of experts that are not known to come from the seed.

  Averages of weights mean something among models of one origin alone.
  """
  experts = forest.ancestry
  strange = [
    name
    for name in names
    if name != records.SEED and not records.from_seed(experts, name)
  ]
  if strange:
    logging.warning(
      'Nothing says that %s come from the seed of %s: an average of weights '
      'means something among models of one origin alone.',
      ', '.join(strange), forest.path,
    )  # fmt: skip


def _beside(forest, names, method, options):
  """Base and statistics, as far as the method wants them."""
  built = named.resolve(method, **options)
  given: dict[str, Any] = {}
  if built.base != 'ignored':
    given['base'] = forest.model(records.SEED)
  if built.statistics:
    kind = built.statistics[0].name
    given['stats'] = [_statistic(forest, name, kind) for name in names]
  return given


def _statistic(forest, name, kind):
  folder = forest.folder(name) / 'statistics'
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if saved.load(path).kind == kind:
      return path
  raise errors.ConfigError(
    f'The method needs a {kind} of every expert, and {name} has none: collect '
    f'it (`mergejax stats {kind} {forest.model(name)} ...`) and add the expert '
    'with it.'
  )
