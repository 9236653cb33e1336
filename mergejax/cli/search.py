# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax search RECIPE OUT`: coefficients of a merge, by held-out data.

    merge:                             # a merge recipe; what varies is left out
      merge_method: task_arithmetic
      base_model: path/to/base
      models: [path/to/a, path/to/b]
    suite: suite.yaml                  # or the suite itself
    split: validation                  # of the suite
    tasks: [books, news]               # all of them by default
    strategy: grid                     # see below
    rank: {pick: 2, score: logme}      # first choose among the models
    evaluate: test                     # last, a table of base, models, winner
    seed: 0

and, by strategy:

    grid       vary: scale             # weights, weight, or an option
               low: 0.0
               high: 1.0
               granularity: model      # or block: coefficients for each layer
               points: 11              # in each direction
    simplex    points: 51              # weights that sum to 1: for two models
                                       # even steps, for more random draws
    random, one_plus_one, cmaes
               as grid, with budget: 40 (evaluations) and start, not points
    gradient   granularity: model      # or block, or leaf
               loss: cross_entropy     # or entropy: AdaMerging, without labels
               budget: 100             # updates
               learning_rate: 0.05
    greedy     accept: ge              # or gt

Models may be adapters of the base, by their folders: each is folded into it.

OUT gets `recipe.yaml`, which `mergejax merge` takes, every candidate in
`candidates.jsonl`, and a plot.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax
import yaml

from mergejax import adapters
from mergejax import models as models_lib
from mergejax.adapters import changes
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.cli import common
from mergejax.cli import search_request
from mergejax.core import tree as tree_lib
from mergejax.evaluation import base as evaluation_base
from mergejax.evaluation import plots
from mergejax.evaluation import recipes
from mergejax.search import base as base_lib
from mergejax.search import evolve
from mergejax.search import gradient
from mergejax.search import greedy
from mergejax.search import grid
from mergejax.select import ranking
from mergejax.statistics import saved
from mergejax.training import losses


def main(arguments: Sequence[str]) -> None:
  """Reads the recipe, searches, writes what it found."""
  parser = common.parser('search', 'Search coefficients of a merge.')
  parser.add_argument('recipe', help='a YAML file')
  parser.add_argument('out', help='a folder; the same command continues in it')
  parser.add_argument('--dry_run', action='store_true', help='check only')
  options = parser.parse_args(arguments)
  request = search_request.load(options.recipe)
  print(request.describe(), flush=True)
  if not options.dry_run:
    _Search(request, pathlib.Path(options.out)).run()


class _Search:
  """One search, from a checked request to its results."""

  def __init__(self, request: search_request.Request, out: pathlib.Path):
    self._request, self._out = request, out

  def run(self) -> None:
    """Loads, ranks, searches, writes."""
    module, params, base = self._load()
    if 'rank' in self._request.data:
      params = self._pick(module, params)
    request = self._request
    evaluate = request.suite.evaluator(module, request.split, request.tasks)
    self._out.mkdir(parents=True, exist_ok=True)
    if request.strategy == 'greedy':
      recipe, log, names = self._greedy(params, evaluate)
    elif request.strategy == 'gradient':
      recipe, log, names = self._gradient(module, params, base)
    else:
      recipe, log, names = self._search(params, base, evaluate)
    common.write_text(
      self._out / 'recipe.yaml', yaml.safe_dump(recipe, sort_keys=False)
    )
    if log.candidates and names:
      plots.search(
        [one.point for one in log.candidates],
        [one.objective for one in log.candidates],
        names, self._out / 'scores.png',
      )  # fmt: skip
      best = log.best()
      print(f'best      {best.objective:.4f} at {np.round(best.point, 4).tolist()}')  # fmt: skip
    print(f'recipe    {self._out / "recipe.yaml"}')
    if 'evaluate' in request.data:
      self._table(module, params, base, recipe)

  def _load(self):
    request = self._request
    loaded = [adapters.load_model(request.loaded(p)) for p in request.paths]
    base = None
    if request.recipe.base:
      _, base = models_lib.load_model(request.recipe.base)
    return loaded[0][0], [params for _, params in loaded], base

  def _pick(self, module, params):
    """The models that rank first, by their mean place over the tasks."""
    request = self._request
    rank = {'pick': 2, 'score': 'logme', **(request.data['rank'] or {})}
    tasks = request.suite.read('train', request.tasks, model=module)
    table = ranking.rank(
      ((p, module, t) for p, t in zip(request.paths, params)), tasks,
      score=rank['score'],
    )  # fmt: skip
    print(evaluation_base.to_text(table))
    places = dict.fromkeys(table, 0)
    for task in tasks:
      for place, path in enumerate(
        sorted(table, key=lambda p: -table[p][task])
      ):
        places[path] += place
    chosen = sorted(places, key=places.get)[: rank['pick']]
    print(f'picked    {", ".join(chosen)}')
    kept = [t for p, t in zip(request.paths, params) if p in chosen]
    self._request = request.picked(chosen)
    return kept

  def _settings(self):
    """All that scores depend on: files by what they hold, not by name."""
    request = self._request
    source = request.recipe.entry.source
    axes = self._axes()
    return {
      'recipe': request.data,
      # Of a method from outside the package; its name stays as it changes.
      **({} if source is None else {'method': source}),
      **({'axes': axes} if axes else {}),
      'models': request.fingerprints,
      'picked': request.paths,
      'data': {
        n: request.suite.content(n, request.split) for n in request.tasks
      },
      'stats': [
        fingerprints.fingerprint(checkpoint.open_checkpoint(path))
        for path in request.recipe.stats
      ],
    }

  def _axes(self):
    """Logical axes of the parameters, where they are known."""
    first = self._request.loaded(self._request.paths[0])
    return models_lib.axes(changes.parts(first)[0])

  def _log(self):
    return base_lib.Log(self._out / 'candidates.jsonl', self._settings())

  def _search(self, params, base, evaluate):
    request, log = self._request, self._log()
    space = request.space()
    if request.data.get('granularity') == 'block':
      space = request.space(base_lib.blocks_of(list(tree_lib.flatten(base or params[0]))))  # fmt: skip
    recipe = request.recipe
    stats = [dict(saved.load(path)) for path in recipe.stats] or None
    axes = self._axes()

    def merge(models, point):
      return space.merge(
        models['params'], point, base=models.get('base'),
        stats=models.get('stats'), axes=axes, dtype=recipe.dtype,
        seed=recipe.seed,
      )  # fmt: skip

    models = {'params': params, 'base': base, 'stats': stats}
    models = {name: one for name, one in models.items() if one is not None}
    with log:
      if request.strategy in ('grid', 'simplex'):
        points = _points(request, space)
        if space.vary in request.recipe.entry.counted:
          evaluate = evaluate.compiled()
        grid.grid(merge, models, evaluate, points, log=log, progress=_progress)
      else:
        score = evaluate.compiled()
        score_at = lambda point: score(
          merge(models, jnp.asarray(point, jnp.float32))
        )
        evolve.evolve(
          space, score_at, budget=request.number('budget', 40),
          strategy=request.strategy, seed=request.seed, log=log,
          progress=_progress,
        )  # fmt: skip
    return request.to_recipe(space, log.best().point), log, space.names

  def _greedy(self, params, evaluate):
    request, log = self._request, self._log()
    with log:
      soup = greedy.greedy(
        params,
        evaluate.compiled(),
        accept=request.data.get('accept', 'ge'),
        log=log,
      )
    print(f'soup      of {len(soup.ingredients)} models, {soup.score:.4f}')
    models = [{'model': request.paths[k]} for k in sorted(soup.ingredients)]
    recipe = {'merge_method': 'linear', 'models': models, **request.kept()}
    return recipe, log, ()

  def _gradient(self, module, params, base):
    request = self._request
    entropy = request.data.get('loss') == 'entropy'
    family = models_lib.family_of(module)
    batches = request.suite.read(request.split, request.tasks, model=family)
    rate = request.number('learning_rate', 1e-3 if entropy else 0.05)
    total = sum(map(len, batches.values()))
    steps = request.number('budget', 1000 if entropy else 5 * total)
    # AdaMerging looks at every task in each update, a soup at one batch.
    rng = np.random.default_rng(request.seed)
    groups = batches.values() if entropy else [sum(batches.values(), [])]
    rounds = zip(*(_shuffled(some, steps, rng) for some in groups))
    one_loss = _entropy if entropy else _cross_entropy

    def loss(params, several, temperature):
      found = [
        one_loss(family, params, batch, temperature) for batch in several
      ]
      metrics = [told for _, told in found]
      worst = {n: jnp.max(jnp.stack([m[n] for m in metrics])) for n in metrics[0]}  # fmt: skip
      return sum(value for value, _ in found), worst

    optimizer = optax.adamw(rate, weight_decay=0.0)
    if entropy:
      optimizer = optax.adam(rate)
    learned = gradient.learn(
      params, loss, rounds, base_model=base,
      granularity=request.data.get('granularity', 'model'),
      constraint='softmax' if base is None else 'none',
      temperature=not entropy, optimizer=optimizer,
      journal=self._out / 'journal.json', settings=self._settings(),
      progress=lambda step, loss: _progress(step, steps),
    )  # fmt: skip
    lines = [
      json.dumps({'step': i, 'loss': value, **metrics})
      for i, (value, metrics) in enumerate(zip(learned.losses, learned.metrics))
    ]
    common.write_text(self._out / 'candidates.jsonl', '\n'.join(lines) + '\n')
    print(f'loss      {learned.losses[0]:.4f} to {learned.losses[-1]:.4f}')
    space, point = base_lib.learned_space(
      request.recipe.method, learned.coefficients
    )
    return request.to_recipe(space, point), base_lib.Log(), ()

  def _table(self, module, params, base, recipe):
    request = self._request
    rows = list(zip(request.paths, params))
    if base is not None:
      rows.insert(0, (request.recipe.base, base))
    _, merged = recipes.load_merged(recipe)
    table = request.suite.table(
      [*((name, module, tree) for name, tree in rows),
       ('the merge', module, merged)],
      request.data['evaluate'], request.tasks,
    )  # fmt: skip
    print(request.suite.describe_metrics(request.tasks))
    print(table.to_text())
    common.write_text(
      self._out / 'table.json', json.dumps(table.to_json(), indent=2) + '\n'
    )


def _points(request, space):
  """The points of a grid or simplex, `<float64>[points, coefficients]`."""
  if request.strategy == 'simplex':
    count = request.number('points', 51)
    if space.count == 2:
      return grid.pairs(count)
    return grid.dirichlet(space.count, count, request.seed)
  count = request.number('points', 11)
  if len(space.names) == 1:
    return grid.line(space, count)
  return grid.lattice(space, count)


def _shuffled(batches, steps, rng):
  """`steps` batches, each epoch in an order of its own."""
  order = []
  while len(order) < steps:
    order.extend(rng.permutation(len(batches)).tolist())
  return [batches[i] for i in order[:steps]]


def _cross_entropy(family, params, batch, temperature):
  logits = temperature * family.logits(params, batch)
  targets = jnp.asarray(family.targets(batch), jnp.int32)
  value, _ = losses.token_cross_entropy(logits, targets)
  return losses.weighted_mean(value, family.target_weights(batch)), {}


def _entropy(family, params, batch, temperature):
  """Of classes, or of the first word of an answer, which no label precedes."""
  logits = temperature * family.logits(params, batch)
  weights = family.target_weights(batch)
  if logits.ndim == 3:
    # A prompt may stand before it.
    first = jnp.argmax(weights > 0, axis=1)
    logits = jnp.take_along_axis(logits, first[:, None, None], axis=1)[:, 0]
    weights = jnp.take_along_axis(weights, first[:, None], axis=1)[:, 0]
  return gradient.entropy(logits, weights)


def _progress(done: int, total: int) -> None:
  if sys.stderr.isatty():
    end = '\n' if done == total else ''
    print(f'\r{done} of {total}', end=end, file=sys.stderr, flush=True)
