# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One table of all methods: with which options, and which laws they obey.

`laws_test` runs the laws in memory; tests of other drivers run the same rows.
"""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np
from reference import merging as oracles
from reference import spheres

from mergejax.core import tree as tree_lib
from mergejax.merging import in_memory
from mergejax.methods import named


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, its oracle, and the laws that it does not obey, with the reason."""

  name: str
  options: dict
  oracle: Callable
  models: int = 3
  # None: weights play no part in the method, or are part of it.
  weights: tuple | None = (0.5, 2.0, 1.0)
  # Run with a base though the method would run without.
  base: bool = False
  # Copies of one model do not merge to it: the method moves beyond or away.
  moves_copies: bool = False
  # The order of the models is part of the question, or seeds their masks.
  ordered: bool = False
  # Masks are random, by the name of the leaf.
  drawn: bool = False
  # A model of weight 0 still counts: its magnitude, count or sign is looked at.
  counts_zero_weight: bool = False
  # Copies of every leaf are held: states do not add.
  gathered: bool = False
  # Statistics that the models bring.
  stats: str | None = None
  # Largest difference to the float64 oracle, where float32 cannot give 1e-6.
  tolerance: float = 1e-6


TRIMMED = dict(moves_copies=True)  # what is trimmed or dropped does not return
# Every model has its own mask.
DRAWN = dict(moves_copies=True, ordered=True, drawn=True)
PAIR = dict(models=1, weights=None, moves_copies=True)
EACH = [0.4, 0.7, 1.0]  # a density for each model

ROWS = (
    Row('linear', {}, oracles.linear),
    Row('linear', {'normalize': False}, oracles.linear, moves_copies=True),
    Row('interpolate', {'alpha': 0.3}, oracles.interpolate, moves_copies=True),
    Row('passthrough', {}, oracles.passthrough, models=1, weights=None),
    Row('task_arithmetic', {'scale': 0.4}, oracles.task_arithmetic,
        moves_copies=True),
    Row('task_arithmetic', {'normalize': True}, oracles.task_arithmetic),
    Row('negate', {'scale': 0.5}, oracles.negate, **PAIR),
    Row('analogy', {'scale': 0.7}, oracles.analogy, weights=None,
        moves_copies=True, ordered=True),
    Row('ties', {'density': 0.4}, oracles.ties, **TRIMMED),
    Row('ties', {'density': 1.0, 'trim_scope': 'tensor'}, oracles.ties),
    Row('ties', {'density': EACH, 'trim_scope': 'tensor', 'scale': 0.5,
                 'normalize': False, 'consensus': 'count'}, oracles.ties,
        **TRIMMED, ordered=True),
    Row('ties', {'density': 0.5, 'aggregate': 'max', 'trim_scope': 'tensor'},
        oracles.ties, **TRIMMED, gathered=True),
    Row('breadcrumbs', {'density': 0.5, 'gamma': 0.2}, oracles.breadcrumbs,
        **TRIMMED),
    Row('breadcrumbs_ties', {'density': EACH, 'gamma': 0.1, 'normalize': True},
        oracles.breadcrumbs_ties, ordered=True),
    Row('dare_linear', {'density': 0.5}, oracles.dare_linear, **DRAWN),
    Row('dare_linear', {'density': EACH, 'rescale': 'l1', 'normalize': True},
        oracles.dare_linear, **DRAWN),
    Row('dare_ties', {'density': 0.5, 'rescale': 'l2'}, oracles.dare_ties,
        **DRAWN),
    Row('dare_ties', {'density': 0.7, 'rescale': 'linf', 'normalize': True},
        oracles.dare_ties, **DRAWN),
    Row('della', {'density': 0.5}, oracles.della, **DRAWN),
    Row('della_linear', {'density': [0.3, 0.6, 1.0], 'epsilon': 0.1,
                         'rescale': 'none'}, oracles.della_linear, **DRAWN),
    Row('sce', {}, oracles.sce, weights=None, gathered=True),
    Row('sce', {'select_topk': 0.5}, oracles.sce, weights=None, gathered=True,
        **TRIMMED),
    Row('slerp', {'t': 0.3}, spheres.slerp, **PAIR),
    Row('nuslerp', {}, spheres.nuslerp, models=2, weights=(0.5, 2.0)),
    Row('nuslerp', {'flatten': False}, spheres.nuslerp, models=2,
        weights=(0.5, 2.0), base=True, gathered=True),
    Row('nuslerp', {'flatten': False, 'axis': 'input_feature'},
        spheres.nuslerp, models=2, weights=(0.5, 2.0), gathered=True),
    Row('multislerp', {}, spheres.multislerp),
    Row('multislerp', {'normalize_weights': False}, spheres.multislerp,
        base=True, moves_copies=True),
    Row('karcher', {}, spheres.karcher, weights=None, tolerance=4e-6),
    Row('model_stock', {}, spheres.model_stock, weights=None),
    Row('model_stock', {'filter_wise': True, 'clamp_t': True},
        spheres.model_stock, weights=None, gathered=True),
    Row('nearswap', {'t': 0.2}, oracles.nearswap, **PAIR),
    Row('arcee_fusion', {}, oracles.arcee_fusion, **PAIR),
    Row('ram', {'epsilon': 0.5}, oracles.ram, weights=None, moves_copies=True),
    Row('ram_plus', {'epsilon': 1.2}, oracles.ram_plus, weights=None,
        moves_copies=True),
    Row('fisher', {}, oracles.fisher, stats='fisher', ordered=True),
    Row('fisher', {'favor_first': False, 'normalize_fishers': 'leaf',
                   'floor': 1e-3}, oracles.fisher, stats='fisher'),
    Row('regmean', {'alpha': 0.9}, oracles.regmean, stats='gram',
        tolerance=2e-5),
    Row('regmean', {'alpha': 0.5, 'ridge': 0.1}, oracles.regmean, stats='gram',
        tolerance=2e-5),
)  # fmt: skip
ALL = [(f'{row.name}_{i}', row) for i, row in enumerate(ROWS)]
# One row a method, for laws of the machinery rather than of the numbers.
ONE = list({row.name: (name, row) for name, row in reversed(ALL)}.values())
# Other options of the same methods.
FURTHER = [pair for pair in ALL if pair not in ONE]
AXES = (('b/kernel', ('layers', 'embed', 'mlp')),)


def make(count, seed=0, dtype=np.float32):
  """Models of odd shapes, with zeros, ties and a stacked kernel."""
  rng = np.random.default_rng(seed)
  shapes = {'a/kernel': (5, 3), 'a/bias': (3,), 'b/kernel': (2, 4, 1), 'c': ()}
  models = []
  for _ in range(count):
    model = {p: np.asarray(rng.normal(size=s)) for p, s in shapes.items()}
    model['a/kernel'][0] = 0.0
    model['a/kernel'][1] = 0.25
    models.append({p: leaf.astype(dtype) for p, leaf in model.items()})
  return models


def make_stats(row, models):
  """Statistics as the row wants them, with entries that nobody knows."""
  if row.stats is None:
    return None
  rng = np.random.default_rng(1)
  result = []
  for model in models:
    if row.stats == 'fisher':
      one = {
        p: {'fisher': rng.gamma(1.0, size=leaf.shape)}
        for p, leaf in sorted(model.items())
      }
      one['a/kernel']['fisher'][2] = 0.0
    else:
      x = rng.normal(size=(20, 5))
      x[:, 3] = 0.0  # a dead input feature
      y = rng.normal(size=(2, 20, 4))
      one = {
        'a/kernel': {'gram': x.T @ x / 20},
        'b/kernel': {'gram': np.swapaxes(y, 1, 2) @ y / 20},
      }
    result.append(jax.tree.map(lambda leaf: leaf.astype(np.float32), one))
  return result


def run(row, models, base, weights=None, **kwargs):
  method = named.resolve(row.name, **row.options)
  weights = row.weights if weights is None else weights
  stats = None if 'stats' in kwargs else make_stats(row, models)
  if 'axes' not in kwargs:
    kwargs['axes'] = [rule for rule in AXES if rule[0] in models[0]]
  return in_memory.merge(
    models,
    method,
    base=base if row.base or method.base == 'required' else None,
    weights=weights[: len(models)] if weights is not None else None,
    **{'stats': stats, **kwargs},
  )


def recipe_of(row, base, paths, stats=()):
  """The recipe of a row over checkpoints."""
  options = {
    'lambda' if name == 'scale' and row.name != 'passthrough' else name: value
    for name, value in row.options.items()
    if not isinstance(value, list)
  }
  # What a recipe would fill in with mergekit's defaults.
  for name, parameter in named.METHODS.options(row.name).items():
    if name not in row.options and name not in ('scale', 'normalize_weights'):
      if parameter.default is not parameter.empty:
        options.setdefault(name, parameter.default)
  entries = []
  for k, path in enumerate(paths):
    own = {n: v[k] for n, v in row.options.items() if isinstance(v, list)}
    if row.weights is not None:
      own['weight'] = row.weights[k]
    entries.append({'model': path, 'parameters': own})
  recipe = {
    'merge_method': row.name,
    'models': entries,
    'parameters': {
      k: v for k, v in options.items() if not isinstance(v, (list, tuple))
    },
  }
  if base is not None:
    recipe['base_model'] = base
  if stats:
    recipe['stats'] = list(stats)
  return recipe


def expected(row, models, base, weights=None):
  """The oracle's answer; each layer of a stack is a leaf of its own."""

  def split(tree):
    layers = {f'b/kernel[{i}]': tree['b/kernel'][i] for i in range(2)}
    return {
      new: leaf
      for path in tree
      for new, leaf in (
        layers.items() if path == 'b/kernel' else [(path, tree[path])]
      )
    }

  method = named.resolve(row.name, **row.options)
  options = dict(row.options)
  if row.stats is not None:
    options['stats'] = []
    for one in make_stats(row, models):
      if 'b/kernel' in one:
        stacks = one.pop('b/kernel')
        for i in range(2):
          one[f'b/kernel[{i}]'] = {n: s[i] for n, s in stacks.items()}
      options['stats'].append({p: one[p] for p in split(models[0]) if p in one})
  weights = weights or row.weights or (1.0,) * len(models)
  merged = row.oracle(
    [split(m) for m in models],
    split(base) if row.base or method.base == 'required' else None,
    weights[: len(models)],
    **options,
  )
  merged['b/kernel'] = np.stack(
    [merged.pop(f'b/kernel[{i}]') for i in range(2)]
  )
  return {path: merged[path] for path in models[0]}


def assert_close(actual, expected, atol=1e-6):
  rtol = atol
  assert sorted(tree_lib.flatten(actual)) == sorted(tree_lib.flatten(expected))
  for path, leaf in tree_lib.flatten(actual).items():
    np.testing.assert_allclose(
      np.asarray(leaf, np.float64),
      np.asarray(tree_lib.flatten(expected)[path], np.float64),
      rtol=rtol,
      atol=atol,
      err_msg=path,
    )
