# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Uniform and greedy model soups."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mergejax.checkpoints import base as store_base
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.merging import in_memory
from mergejax.merging import streaming
from mergejax.methods import base as merge_base
from mergejax.methods import mean
from mergejax.search import base

# The state of a soup: sums, and how many models they are of.
_MEAN = streaming.Stream(mean.linear())


@dataclasses.dataclass(frozen=True)
class Soup:
  """A greedy soup.

  Attributes:
    params: the mean of the ingredients.
    ingredients: their numbers, in the order in which they were added.
    score: of the soup, on the held-out data.
    single_scores: of every model alone, None where the order was given.
    candidate_scores: of the first model, then of every soup that was tried.
    order: in which models were tried.
  """

  params: typing.Tree
  ingredients: tuple[int, ...]
  score: float
  single_scores: tuple[float, ...] | None
  candidate_scores: tuple[float, ...]
  order: tuple[int, ...]


def uniform(
  models: Sequence[typing.Tree | store_base.ParamStore],
) -> typing.Tree:
  """The plain mean of all models; the head is averaged too."""
  return in_memory.merge(models, mean.linear())


def greedy(
  models: Sequence[typing.Tree | store_base.ParamStore],
  evaluate: Callable[[typing.Tree], Any],
  *,
  accept: str = 'ge',
  higher_is_better: bool = True,
  order: Sequence[int] | None = None,
  log: base.Log | None = None,
) -> Soup:
  """Adds models to a mean, best first, as long as the mean does not get worse.

  With n ingredients the candidate is `(n soup + theta) / (n + 1)`, from a sum
  kept in float32. No model is tried twice, so K models cost at most K
  evaluations alone and K - 1 of soups.

  Args:
    models: trees or stores, K of them; only one is read at a time.
    evaluate: `params -> score`, a number or `{task: score}` whose mean counts,
      on held-out data; never on the test set.
    accept: 'ge' keeps a model that leaves the score equal, as the paper's
      recipe; 'gt' asks for a better one, as the released script.
    higher_is_better: False for losses.
    order: the numbers of the models in the order to try them, if known;
      otherwise by their own score. Of equal models the later one comes first,
      as in the released script.
    log: where scores are written down; what it holds is not evaluated again.

  Returns:
    The soup. Its score is never worse than that of the best model alone.

  Raises:
    UserError: no model, models that differ, an order that is not one of all
      models, not one finite score.

  Source: Wortsman et al., "Model soups" (2022),
  https://arxiv.org/abs/2203.05482, recipe 1.
  """
  merge_base.check_choice('accept', accept, ('ge', 'gt'))
  count = len(models)
  if not count:
    raise errors.ConfigError('A soup needs at least one model; none was given.')
  sources = [in_memory.Source(m, f'model {i}') for i, m in enumerate(models)]
  for source in sources[1:]:
    tree_lib.check_same(
      sources[0].specs, source.specs,
      expected_name=sources[0].name, given_name=source.name,
    )  # fmt: skip
  log = base.Log() if log is None else log

  def score(members, params):
    """Higher is better; what is not finite is worst. Memoised by the log."""
    point = np.isin(np.arange(count), members) / len(members)
    found = log.recorded(point)
    if found is None:
      scores = evaluate(params())
      if not isinstance(scores, dict):
        scores = {'score': scores}
      found = log.add(point, scores)
      log.check_stop()
    value = base.mean_score(found.scores)
    value = value if higher_is_better else -value
    return value if math.isfinite(value) else -math.inf

  alone = lambda k: score([k], lambda: _tree(_params(sources[k]), sources[k]))
  single = None
  if order is None:
    single = tuple(alone(k) for k in range(count))
  order = _order(order, single, count)
  first = order[0]
  best = alone(first) if single is None else single[first]
  if best == -math.inf:
    raise errors.DataError(
      'The best model has no finite score: check the evaluation and the models.'
    )
  chosen, tried = [first], [best]
  states = _add(None, _params(sources[first]))
  for k in order[1:]:
    bigger = _add(states, _params(sources[k]))
    value = score([*chosen, k], lambda b=bigger: _soup(b, sources[0]))
    tried.append(value)
    if value > best or (value == best and accept == 'ge'):
      states, best = bigger, value
      chosen.append(k)
  sign = 1 if higher_is_better else -1
  return Soup(
    _soup(states, sources[0]),
    tuple(chosen),
    sign * best,
    None if single is None else tuple(sign * s for s in single),
    tuple(sign * t for t in tried),
    order,
  )


def _order(order, single, count):
  """The numbers of the models, in the order to try them."""
  if order is None:
    # Stable by ascending score, then reversed.
    return tuple(reversed(np.argsort(single, kind='stable').tolist()))
  order = tuple(int(k) for k in order)
  if sorted(order) != list(range(count)):
    raise errors.ConfigError(
      f'order must hold each of 0 to {count - 1} once, not {list(order)}.'
    )
  return order


def _params(source):
  return {path: source.leaf(path) for path in source.specs}


def _add(states, params):
  """The soup with one model more; other than float leaves are the first's."""
  return {
    path: _MEAN.add(states and states[path], leaf)
    if numerics.is_averaged(leaf.dtype)
    else (leaf if states is None else states[path])
    for path, leaf in params.items()
  }


def _soup(states, source):
  leaves = {}
  for path, state in states.items():
    dtype = source.specs[path].dtype
    averaged = numerics.is_averaged(dtype)
    leaves[path] = _MEAN.result(state, dtype) if averaged else state
  return _tree(leaves, source)


def _tree(leaves, source):
  if source.structure is not None:
    return jax.tree.unflatten(source.structure, list(leaves.values()))
  return tree_lib.unflatten(leaves)
