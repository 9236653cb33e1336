# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax search RECIPE OUT`: coefficients of a merge, chosen on held-out data.

    merge:                             # a merge recipe; what varies is left out
      merge_method: task_arithmetic
      base_model: path/to/base
      models: [path/to/a, path/to/b]
    suite: suite.yaml                  # or the suite itself
    vary: scale                        # weights, weight, or an option
    strategy: grid                     # grid, random, one_plus_one, cmaes,
                                       # gradient or greedy
    low: 0.0
    high: 1.0
    points: 11                         # of a grid, in each direction
    budget: 40                         # evaluations of other strategies
    granularity: model                 # or block: coefficients for each layer
    rank: {pick: 2, score: logme}      # first choose among the models
    evaluate: test                     # last, a table of base, models, winner

OUT gets `recipe.yaml`, which `mergejax merge` takes, every candidate in
`candidates.jsonl`, and a plot.
"""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from mergejax import errors
from mergejax import models as models_lib
from mergejax import recipe as recipe_lib
from mergejax import tree as tree_lib
from mergejax.evaluation import plots
from mergejax.evaluation import scores
from mergejax.evaluation import suite as suite_lib
from mergejax.run import common
from mergejax.run import evaluate as evaluate_command
from mergejax.search import base as base_lib
from mergejax.search import evolve
from mergejax.search import gradient
from mergejax.search import greedy
from mergejax.search import grid
from mergejax.select import ranking
from mergejax.stats import saved
from mergejax.store import base as store_base
from mergejax.train import losses

STRATEGIES = (*evolve.STRATEGIES, 'grid', 'gradient', 'greedy')
_TOP = (
  'merge', 'suite', 'split', 'tasks', 'vary', 'strategy', 'low', 'high',
  'start', 'points', 'budget', 'granularity', 'seed', 'rank', 'evaluate',
  'learning_rate',
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
  """Reads the recipe, searches, writes what it found."""
  parser = common.parser('search', 'Search coefficients of a merge.')
  parser.add_argument('recipe', help='a YAML file')
  parser.add_argument('out', help='a folder; the same command continues in it')
  parser.add_argument('--dry_run', action='store_true', help='check only')
  options = parser.parse_args(arguments)
  search = _Search(_read(options.recipe), pathlib.Path(options.out))
  print(search.describe(), flush=True)
  if not options.dry_run:
    search.run()


def _read(path):
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.UserError(f'There is no search recipe at {path}.')
  try:
    data = yaml.safe_load(file.read_text(encoding='utf-8'))
  except yaml.YAMLError as error:
    raise errors.UserError(f'{path} is not YAML: {error}') from error
  if not isinstance(data, dict):
    raise errors.UserError(f'{path} should hold a mapping; see the docs.')
  for word in data:
    if word not in _TOP:
      raise errors.UserError(
        errors.near(str(word), _TOP, 'word of a search recipe,')
      )
  for word in ('merge', 'suite'):
    if word not in data:
      raise errors.UserError(f'{path} lacks {word!r}.')
  return data


class _Search:
  """One search, from a checked recipe to its results."""

  def __init__(self, data, out):
    self._data, self._out = data, out
    self._strategy = data.get('strategy', 'grid')
    if self._strategy not in STRATEGIES:
      raise errors.UserError(
        errors.near(str(self._strategy), STRATEGIES, 'search strategy')
      )
    self._recipe = recipe_lib.parse_recipe(data['merge'])
    self._check_recipe()
    self._suite = suite_lib.load(data['suite'])
    self._names = list(data.get('tasks') or self._suite.tasks)
    for name in self._names:
      if name not in self._suite.tasks:
        raise errors.UserError(
          errors.near(str(name), self._suite.tasks, 'task of the suite')
        )
    self._split = data.get('split', 'validation')
    self._paths = [one.model for one in self._recipe.slices[0].inputs]
    self._space = self._make_space(self._paths)

  def _check_recipe(self):
    recipe = self._recipe
    for what, given in (
      ('slices', recipe.sliced), ('rules', recipe.rules),
      ('vocab', recipe.vocab), ('tokenizer', recipe.tokenizer),
      ('axes', recipe.axes),
    ):  # fmt: skip
      if given:
        raise errors.UserError(
          f'A search merges in memory and does not take {what!r}: merge such '
          'models to checkpoints of one shape first.'
        )

  def _make_space(self, paths, blocks=('*',)):
    data = self._data
    low, high = float(data.get('low', 0)), float(data.get('high', 1))
    options = dict(self._recipe.parameters)
    options.pop('weight', None)
    return base_lib.Space(
      self._recipe.method, len(paths), options=options,
      vary=data.get('vary', 'weights'), low=low, high=high,
      start=float(data.get('start', (low + high) / 2)), blocks=tuple(blocks),
    )  # fmt: skip

  def describe(self) -> str:
    """What will be done."""
    return (
      f'search    {self._recipe.method}, {self._space.vary} of '
      f'{len(self._paths)} models by {self._strategy}\n'
      f'objective mean over {", ".join(self._names)} ({self._split})'
    )

  def run(self) -> None:
    """Loads, ranks, searches, writes."""
    module, params, base = self._load()
    if 'rank' in self._data:
      params = self._pick(module, params)
    evaluate = self._suite.evaluator(module, self._split, self._names)
    self._out.mkdir(parents=True, exist_ok=True)
    if self._strategy == 'greedy':
      recipe, log, names = self._greedy(params, evaluate)
    elif self._strategy == 'gradient':
      recipe, log, names = self._gradient(module, params, base)
    else:
      recipe, log, names = self._search(params, base, evaluate)
    _write(self._out / 'recipe.yaml', yaml.safe_dump(recipe, sort_keys=False))
    if log.candidates and names:
      plots.search(log, names, self._out / 'scores.png')
      best = log.best()
      print(f'best      {best.objective:.4f} at {np.round(best.point, 4).tolist()}')  # fmt: skip
    print(f'recipe    {self._out / "recipe.yaml"}')
    if 'evaluate' in self._data:
      self._table(module, params, base, recipe)

  def _load(self):
    module, params = None, []
    for path in self._paths:
      own, tree = models_lib.load_model(path)
      if module is not None and own != module:
        raise errors.UserError(
          f'{path} is of another architecture than {self._paths[0]}: their '
          'config.json differ.'
        )
      module = own
      params.append(tree)
    base = None
    if self._recipe.base:
      _, base = models_lib.load_model(self._recipe.base)
    return module, params, base

  def _pick(self, module, params):
    """The models that rank first, by their mean place over the tasks."""
    rank = {'pick': 2, 'score': 'logme', **(self._data['rank'] or {})}
    tasks = {n: self._suite.batches(n, 'train') for n in self._names}
    table = ranking.rank(
      ((p, module, t) for p, t in zip(self._paths, params)), tasks,
      score=rank['score'],
    )  # fmt: skip
    print(scores.to_text(table))
    places = {path: 0 for path in table}
    for task in tasks:
      for place, path in enumerate(
        sorted(table, key=lambda p: -table[p][task])
      ):
        places[path] += place
    chosen = sorted(places, key=places.get)[: int(rank['pick'])]
    print(f'picked    {", ".join(chosen)}')
    kept = [(p, t) for p, t in zip(self._paths, params) if p in chosen]
    self._paths = [p for p, _ in kept]
    self._space = self._make_space(self._paths)
    return [t for _, t in kept]

  def _settings(self):
    return {'recipe': self._data, 'models': self._paths}

  def _log(self):
    return base_lib.Log(self._out / 'candidates.jsonl', self._settings())

  def _search(self, params, base, evaluate):
    if self._data.get('granularity', 'model') == 'block':
      blocks = base_lib.blocks_of(list(tree_lib.flatten(params[0])))
      self._space = self._make_space(self._paths, blocks)
    space, log = self._space, self._log()
    stats = [dict(saved.load(path)) for path in self._recipe.stats] or None
    seed = self._recipe.seed

    def merge(models, point):
      return space.merge(
        models['params'], point, base=models.get('base'),
        stats=models.get('stats'), seed=seed,
      )  # fmt: skip

    models = {'params': params}
    if base is not None:
      models['base'] = base
    if stats is not None:
      models['stats'] = stats
    if self._strategy == 'grid':
      count = int(self._data.get('points', 11))
      points = (
        grid.line(space, count)
        if len(space.names) == 1
        else grid.lattice(space, count)
      )
      if not _traceable(space):
        evaluate = _plain(evaluate)
      grid.grid(merge, models, evaluate, points, log=log, progress=_progress)
    else:
      one = lambda point: _plain(evaluate)(merge(models, jnp.asarray(point, jnp.float32)))  # fmt: skip
      evolve.evolve(
        space, one, budget=int(self._data.get('budget', 40)),
        strategy=self._strategy, seed=int(self._data.get('seed', 0)), log=log,
        progress=_progress,
      )  # fmt: skip
    best = log.best()
    recipe = space.to_recipe(best.point, self._paths, self._recipe.base)
    if self._recipe.stats:
      recipe['stats'] = list(self._recipe.stats)
    return recipe, log, space.names

  def _greedy(self, params, evaluate):
    log = self._log()
    soup = greedy.greedy(params, _plain(evaluate), log=log)
    print(f'soup      of {len(soup.ingredients)} models, {soup.score:.4f}')
    models = [{'model': self._paths[k]} for k in sorted(soup.ingredients)]
    return {'merge_method': 'linear', 'models': models}, log, ()

  def _gradient(self, module, params, base):
    granularity = self._data.get('granularity', 'model')
    batches = [
      b for n in self._names for b in self._suite.batches(n, self._split)
    ]
    steps = int(self._data.get('budget', 5 * len(batches)))
    rng = np.random.default_rng(int(self._data.get('seed', 0)))
    order = np.concatenate(
      [rng.permutation(len(batches)) for _ in range(steps // len(batches) + 1)]
    )[:steps]

    def loss(params, batch, heat):
      logits = heat * models_lib.logits(module, params, batch)
      value, _ = losses.token_cross_entropy(logits, models_lib.targets(batch))
      weights = models_lib.target_weights(batch)
      return jnp.sum(value * weights) / jnp.maximum(jnp.sum(weights), 1.0)

    learned = gradient.learn(
      params, loss, (batches[i] for i in order), granularity=granularity,
      base_model=base, constraint='softmax' if base is None else 'none',
      journal=self._out / 'journal.json',
      progress=lambda step, loss: _progress(step, steps),
    )  # fmt: skip
    lines = [json.dumps({'step': i, 'loss': x}) for i, x in enumerate(learned.losses)]  # fmt: skip
    _write(self._out / 'candidates.jsonl', '\n'.join(lines) + '\n')
    method = 'linear' if base is None else 'task_arithmetic'
    blocks = tuple(g for g in learned.coefficients if g != '*') + ('*',)
    space = base_lib.Space(
      method, len(params), blocks=blocks,
      options={'normalize': False} if base is None else {},
    )  # fmt: skip
    fallback = np.full(len(params), 1 / len(params))
    point = np.concatenate(
      [learned.coefficients.get(block, fallback) for block in blocks]
    ).astype(float)
    print(f'loss      {learned.losses[0]:.4f} to {learned.losses[-1]:.4f}')
    recipe = space.to_recipe(point.tolist(), self._paths, self._recipe.base)
    return recipe, base_lib.Log(), ()

  def _table(self, module, params, base, recipe):
    rows = list(zip(self._paths, params))
    if base is not None:
      rows.insert(0, (self._recipe.base, base))
    _, merged = evaluate_command.merged(recipe)
    table = self._suite.table(
      [*((name, module, tree) for name, tree in rows),
       ('the merge', module, merged)],
      self._data['evaluate'], self._names,
    )  # fmt: skip
    print(scores.to_text(scores.values(table)))
    _write(
      self._out / 'table.json',
      json.dumps(scores.to_json(table), indent=2) + '\n',
    )


def _traceable(space: base_lib.Space) -> bool:
  """Whether the varied option may be traced: ranks are counted with it."""
  return space.vary not in ('density', 'select_topk', 'gamma', 'epsilon')


def _plain(evaluate: base_lib.Evaluator):
  """An evaluation compiled once, apart from the merge."""
  compiled = jax.jit(evaluate.score)
  return lambda params: jax.device_get(compiled(params, evaluate.data))


def _progress(done: int, total: int) -> None:
  if sys.stderr.isatty():
    end = '\n' if done == total else ''
    print(f'\r{done} of {total}', end=end, file=sys.stderr, flush=True)


def _write(path: pathlib.Path, text: Any) -> None:
  with store_base.atomic_path(path, overwrite=True) as temporary:
    temporary.write_text(text, encoding='utf-8')
