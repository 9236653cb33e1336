# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a search recipe asks for, checked before a weight is read."""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import yaml

from mergejax import models as models_lib
from mergejax.adapters import changes
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.evaluation import scoring
from mergejax.evaluation import suite as suite_lib
from mergejax.merging.disk import planner
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.merging.recipes import sources as sources_lib
from mergejax.models import architectures
from mergejax.search import base as base_lib
from mergejax.search import evolve
from mergejax.select import ranking

_COMMON = (
  'merge', 'suite', 'split', 'tasks', 'strategy', 'seed', 'rank', 'evaluate',
)  # fmt: skip
_RANGE = ('vary', 'low', 'high', 'granularity')
# What each strategy may be told beside that.
_WORDS = {
  'grid': (*_RANGE, 'points'),
  'simplex': ('points',),
  **dict.fromkeys(evolve.STRATEGIES, (*_RANGE, 'start', 'budget')),
  'gradient': ('granularity', 'loss', 'budget', 'learning_rate'),
  'greedy': ('accept',),
}
STRATEGIES = tuple(_WORDS)
# Those that make merges of their own, not that of the recipe.
_OWN_MERGES = ('gradient', 'greedy')
_RANK = ('pick', 'score')
LOSSES = ('cross_entropy', 'entropy')


@dataclasses.dataclass(frozen=True)
class Request:
  """A search recipe whose words are known and whose models fit.

  Attributes:
    data: the recipe as it was read.
    strategy: one of `STRATEGIES`.
    recipe: the merge.
    inputs: the models to merge; a base among them is not one.
    suite: the tasks.
    tasks: names of those that count.
    split: of the suite, to search on.
    fingerprints: of the base and the models as they are now.
  """

  data: Mapping[str, Any]
  strategy: str
  recipe: recipe_lib.Recipe
  inputs: tuple[sources_lib.Input, ...]
  suite: scoring.Suite
  tasks: tuple[str, ...]
  split: str
  fingerprints: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def paths(self) -> list[str]:
    """Paths of the models."""
    return [one.model for one in self.inputs]

  def loaded(self, path: str) -> str:
    """What is loaded for a model: of an adapter, `BASE+ADAPTER`."""
    if self.recipe.base and fold.is_adapter(path):
      return f'{self.recipe.base}+{path}'
    return path

  @property
  def seed(self) -> int:
    """Of the search itself."""
    return self.number('seed', 0, least=0)

  def number(self, word: str, default: Any, least: float = -np.inf) -> Any:
    """A number of the recipe, of the type of its default.

    Raises:
      UserError: something else, or a number that is too small.
    """
    value = self.data.get(word, default)
    whole = isinstance(default, int)
    fits = type(value) is int or (type(value) is float and not whole)
    if not fits or not np.isfinite(value) or value < least:
      kind = 'whole number' if whole else 'number'
      bound = '' if least == -np.inf else f' of at least {least}'
      raise errors.ConfigError(
        f'{word} must be a {kind}{bound}, not {value!r}.'
      )
    return type(default)(value)

  def choice(self, word: str, choices: Sequence[str]) -> str:
    """One of a few words; the first of them by default."""
    value = self.data.get(word, choices[0])
    if value not in choices:
      raise errors.ConfigError(errors.near(str(value), choices, f'{word},'))
    return value

  def picked(self, paths: Sequence[str]) -> 'Request':
    """The same search over some of its models."""
    kept = [i for i, one in enumerate(self.inputs) if one.model in paths]
    stats = tuple(self.recipe.stats[i] for i in kept if self.recipe.stats)
    return dataclasses.replace(
      self,
      inputs=tuple(self.inputs[i] for i in kept),
      recipe=dataclasses.replace(self.recipe, stats=stats),
    )

  def space(self, blocks: Sequence[str] = ('*',)) -> base_lib.Space:
    """What is searched over: the recipe's own settings, and what varies."""
    vary = self.data.get('vary', 'weights')
    settings = self._settings(vary)
    weights = settings.pop('weight', None)
    if weights is not None and not isinstance(weights, list):
      weights = [weights] * len(self.inputs)
    low, high = self.number('low', 0.0), self.number('high', 1.0)
    return base_lib.Space(
      self.recipe.method, len(self.inputs), options=settings, vary=vary,
      weights=weights and tuple(weights), low=low, high=high,
      start=self.number('start', (low + high) / 2), blocks=tuple(blocks),
    )  # fmt: skip

  def _settings(self, vary):
    """`{option: value, or a list of one a model}`, all but what varies."""
    result = dict(self.recipe.entry.recipe_defaults)
    result.pop(vary, None)
    for name in (*self.recipe.entry.options, 'weight'):
      own = [
        one.parameters.get(name, self.recipe.parameters.get(name))
        for one in self.inputs
      ]
      if all(value is None for value in own):
        continue
      shown = self.recipe.entry.recipe_name(name)
      if name == vary or (name == 'weight' and vary == 'weights'):
        raise errors.ConfigError(
          f'The merge gives {shown}, which is what this search varies. Leave '
          'it out of one of the two.'
        )
      if any(isinstance(value, (list, dict)) for value in own):
        raise errors.ConfigError(
          f'{shown} differs along the layers or by name, and a search merges '
          'with plain numbers. Give one number (for each model, if need be).'
        )
      if any(value is None for value in own):
        raise errors.ConfigError(
          f'{shown} is given for some models and not for others.'
        )
      result[name] = own[0] if all(v == own[0] for v in own) else own
    return result

  def to_recipe(
    self, space: base_lib.Space, point: Sequence[float]
  ) -> dict[str, Any]:
    """The merge recipe of a point, with all else that the request's had."""
    result = space.to_recipe(point, self.paths, self.recipe.base)
    return {**result, **self.kept()}

  def kept(self) -> dict[str, Any]:
    """What a resulting recipe takes over from the request's."""
    recipe = self.recipe
    kept = {
      'stats': list(recipe.stats), 'dtype': recipe.dtype,
      'format': recipe.format, 'seed': recipe.seed,
    }  # fmt: skip
    return {word: value for word, value in kept.items() if value}

  def describe(self) -> str:
    """What will be done, in words."""
    vary = self.data.get('vary', 'weights')
    return (
      f'search    {self.recipe.method}, {vary} of {len(self.inputs)} models '
      f'by {self.strategy}\n'
      f'objective mean over {", ".join(self.tasks)} ({self.split})'
    )


def load(path: os.PathLike | str) -> Request:
  """Reads and checks a search recipe; of models only headers are read.

  Raises:
    UserError: no such file, unknown words, words of another strategy, models
      that do not fit each other or the method, statistics of other models.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    raise errors.RecipeError(f'There is no search recipe at {path}.')
  try:
    data = yaml.safe_load(file.read_text(encoding='utf-8'))
  except (yaml.YAMLError, UnicodeDecodeError) as error:
    raise errors.RecipeError(f'{path} is not YAML: {error}') from error
  try:
    return _checked(data)
  except errors.UserError as error:
    raise error.at(path) from error


def _checked(data):
  if not isinstance(data, dict):
    raise errors.RecipeError('a search recipe holds `word: value` lines.')
  strategy = data.get('strategy', 'grid')
  if strategy not in STRATEGIES:
    raise errors.ConfigError(
      errors.near(str(strategy), STRATEGIES, 'search strategy')
    )
  _check_words(data, strategy)
  recipe = recipe_lib.parse_recipe(data['merge'])
  for what, given in (
    ('modules', recipe.modules), ('slices', recipe.sliced),
    ('rules', recipe.rules),
    ('vocab', recipe.vocab), ('tokenizer', recipe.tokenizer),
    ('axes', recipe.axes), ('untie', recipe.untie),
  ):  # fmt: skip
    if given:
      raise errors.ConfigError(
        f'A search merges in memory and does not take {what!r}: merge such '
        'models to checkpoints of one shape first.'
      )
  inputs = recipe.slices[0].inputs
  if recipe.entry.base_policy != 'ignored':
    inputs = tuple(one for one in inputs if one.model != recipe.base)
  suite = suite_lib.load(data['suite'])
  for word in ('split', 'evaluate'):
    if word in data and data[word] not in scoring.SPLITS:
      raise errors.ConfigError(
        errors.near(str(data[word]), scoring.SPLITS, f'{word}, a split,')
      )
  tasks = data.get('tasks') or list(suite.tasks)
  if not isinstance(tasks, list):
    raise errors.ConfigError(f'tasks must be a list of names, not {tasks!r}.')
  for name in tasks:
    if name not in suite.tasks:
      raise errors.ConfigError(
        errors.near(str(name), suite.tasks, 'task of the suite')
      )
    suite.check_compiles(name)
  request = Request(
    data, strategy, recipe, inputs, suite, tuple(tasks),
    data.get('split', 'validation'),
  )  # fmt: skip
  _check_strategy(request)
  return dataclasses.replace(request, fingerprints=_check_models(request))


def _check_words(data, strategy):
  known = (*_COMMON, *_WORDS[strategy])
  for word in data:
    if word in known:
      continue
    users = [name for name, own in _WORDS.items() if word in own]
    if users:
      raise errors.ConfigError(
        f'{word!r} is for {", ".join(users)}; the strategy is {strategy}.'
      )
    raise errors.ConfigError(
      errors.near(str(word), known, f'word of a search by {strategy},')
    )
  for word in ('merge', 'suite'):
    if word not in data:
      raise errors.ConfigError(f'the search recipe lacks {word!r}.')
  rank = data.get('rank') or {}
  if not isinstance(rank, dict):
    raise errors.ConfigError(f'rank must be `{{pick: 2, score: logme}}`, not {rank!r}.')  # fmt: skip
  for word in rank:
    if word not in _RANK:
      raise errors.ConfigError(errors.near(str(word), _RANK, 'word of rank,'))


def _check_strategy(request):
  """Everything of one strategy that can be known now."""
  recipe = request.recipe
  if request.strategy == 'greedy':
    _check_only(request, 'linear')
    request.choice('accept', ('ge', 'gt'))
  elif request.strategy == 'gradient':
    _check_only(request, 'task_arithmetic' if recipe.base else 'linear')
    request.choice('granularity', ('model', 'block', 'leaf'))
    request.number('budget', 1, least=1)
    request.number('learning_rate', 0.05, least=0)
    if request.choice('loss', LOSSES) == 'entropy':
      if not recipe.base:
        raise errors.ConfigError(
          'loss: entropy is AdaMerging, task arithmetic with learned scales: '
          'give the merge a base_model.'
        )
      for name in request.tasks:
        if request.suite.tasks[name].kind == 'lm':
          raise errors.ConfigError(
            f'loss: entropy is for classification, and {name} is plain text.'
          )
  else:
    granularity = request.choice('granularity', ('model', 'block'))
    request.number('budget', 1, least=1)
    request.number('points', 2, least=2)
    request.space(('any', '*') if granularity == 'block' else ('*',))
  if 'rank' in request.data:
    _check_rank(request)


def _check_rank(request):
  rank = request.data['rank'] or {}
  pick = rank.get('pick', 2)
  if type(pick) is not int or not 1 <= pick <= len(request.inputs):
    raise errors.ConfigError(
      f'rank: pick must be a whole number from 1 to {len(request.inputs)}, '
      f'the number of models, not {pick!r}.'
    )
  if rank.get('score', 'logme') not in ranking.SCORES:
    raise errors.ConfigError(
      errors.near(str(rank['score']), ranking.SCORES, 'ranking score')
    )


def _check_only(request, method):
  """The strategies that do their own merging take no settings."""
  recipe = request.recipe
  if recipe.method != method:
    raise errors.ConfigError(
      f'The strategy {request.strategy} finds coefficients of {method}'
      + (' (there is a base_model)' if method == 'task_arithmetic' else '')
      + f', not of {recipe.method}. Name that method, or another strategy.'
    )
  given = {*recipe.parameters, *(n for x in request.inputs for n in x.parameters)}  # fmt: skip
  if given:
    raise errors.ConfigError(
      f'The strategy {request.strategy} finds all coefficients itself; leave '
      f'out {", ".join(sorted(given))}.'
    )


def _check_models(request):
  """Plans the merge of the starting point; returns fingerprints."""
  recipe = request.recipe
  if recipe.of_adapters:
    raise errors.ConfigError(
      'A search folds adapters into their base to evaluate them: leave `format: '
      'adapter` out. `mergejax merge OUT/recipe.yaml ADAPTER --format adapter` '
      'makes an adapter of what it finds.'
    )
  if request.strategy in _OWN_MERGES:
    space = base_lib.Space(recipe.method, len(request.inputs))
  else:
    space = request.space()
  start = request.to_recipe(space, [space.start] * len(space.names))
  planner.plan(recipe_lib.parse_recipe(start))
  paths = list(dict.fromkeys([*([recipe.base] if recipe.base else []), *request.paths]))  # fmt: skip
  bases = {path: changes.parts(request.loaded(path))[0] for path in paths}
  modules = {path: models_lib.load_module(bases[path]) for path in paths}
  if request.data.get('granularity', 'model') != 'model':
    for path in paths:
      _check_layers(bases[path])
  architectures.check(
    {path: models_lib.describe(module) for path, module in modules.items()},
    'A search evaluates all of its models as one architecture.',
  )
  return {path: _fingerprint(request.loaded(path)) for path in paths}


def _fingerprint(path):
  """Of a model; of one with an adapter, those of both."""
  base, adapter = changes.parts(path)
  found = fingerprints.fingerprint(checkpoint.open_checkpoint(base))
  if adapter is None:
    return found
  return f'{found}+{fingerprints.fingerprint(changes.ChangeStore(adapter))}'


def _check_layers(path):
  """Raises if the layers of a checkpoint cannot have their own coefficients."""
  models_lib.check_not_converted(path)
  try:
    base_lib.check_unstacked(checkpoint.open_checkpoint(path).specs())
  except errors.UserError as error:
    raise error.at(path) from error
