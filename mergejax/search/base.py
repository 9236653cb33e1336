# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What searches share: candidates, their log, and what is searched over.

A search is a deterministic sequence of questions. Every answer is written down
before the next question is asked; a search that was killed asks the same
questions again and finds the first answers in the log.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import re
from typing import Any

import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import registry
from mergejax.core import resume
from mergejax.core import stop as stop_lib
from mergejax.core import typing
from mergejax.evaluation import base as evaluation
from mergejax.merging import in_memory
from mergejax.methods import named
from mergejax.names import known

# Coefficients, <float>[n].
Point = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Coefficients that were tried.

  Attributes:
    point: the coefficients, one for each name of the space.
    scores: `{task: score}`.
    objective: what the search maximises.
  """

  point: tuple[float, ...]
  scores: Mapping[str, float]
  objective: float


def mean_score(scores: evaluation.Scores) -> float:
  """The default objective: unweighted mean over tasks."""
  return float(np.mean([float(s) for s in scores.values()]))


class Log:
  """The candidates of a search, in order, in a file of JSON lines or in memory.

  Entered as a context, it hears SIGTERM: the search ends when what it is trying
  is written down, and the same search continues from there.

  Args:
    path: the file; None keeps them in memory only.
    settings: of the search; a log begun with others is refused.
    objective: `scores -> number` to maximise. Scores that are not finite make
      a candidate the worst there can be.

  Raises:
    UserError: the file is of a search with other settings.
  """

  def __init__(
    self,
    path: os.PathLike | str | None = None,
    settings: Mapping[str, Any] | None = None,
    objective: Callable[[evaluation.Scores], float] = mean_score,
  ):
    self.candidates: list[Candidate] = []
    self._recorded: list[Candidate] = []
    self._objective = objective
    self._journal = resume.Journal(path, 'search', settings or {})
    for row in self._journal.rows():
      self._recorded.append(self._candidate(row['point'], row['scores']))
    self._journal.begin()
    self._stop = stop_lib.StopRequest()

  def maximise(self, objective: Callable[[evaluation.Scores], float]) -> None:
    """Judges all candidates, those of the file too, by another objective."""
    self._objective = objective
    for candidates in (self.candidates, self._recorded):
      candidates[:] = [self._candidate(c.point, c.scores) for c in candidates]

  def __enter__(self) -> 'Log':
    self._stop.__enter__()
    return self

  def __exit__(self, *exception) -> None:
    self._stop.__exit__(*exception)

  def check_stop(self) -> None:
    """Ends the search here if that was asked for.

    Raises:
      errors.Stopped: SIGTERM came since the log was entered.
    """
    done = len(self.candidates)
    self._stop.check(f'Stopped after {done} candidates.')

  def _candidate(self, point, scores):
    scores = {name: float(score) for name, score in scores.items()}
    objective = self._objective(scores)
    if not math.isfinite(objective):
      objective = -math.inf
    return Candidate(tuple(float(x) for x in point), scores, objective)

  def recorded(self, point: Point) -> Candidate | None:
    """The next candidate of the log, if it was tried before.

    Raises:
      UserError: the log holds another point there.
    """
    at = len(self.candidates)
    if at >= len(self._recorded):
      return None
    found = self._recorded[at]
    if found.point != tuple(float(x) for x in point):
      raise errors.ConfigError(
        f'{self._journal.path}: candidate {at} of the log is '
        f'{list(found.point)}, but this search asks for '
        f'{list(map(float, point))}: the log is of another search.'
      )
    self.candidates.append(found)
    return found

  def add(self, point: Point, scores: evaluation.Scores) -> Candidate:
    """Writes down a candidate that has just been tried."""
    candidate = self._candidate(point, scores)
    self.candidates.append(candidate)
    self._journal.append({'point': candidate.point, 'scores': candidate.scores})
    return candidate

  def best(self) -> Candidate:
    """The best candidate; the first of equals."""
    if not self.candidates:
      raise errors.ConfigError('A search must try at least one candidate.')
    best = max(self.candidates, key=lambda candidate: candidate.objective)
    if best.objective == -math.inf:
      raise errors.DataError(
        'No candidate has a finite score; look at the models, and at the log.'
      )
    return best


@dataclasses.dataclass(frozen=True)
class Space:
  """What is searched over: the arguments of a merge, as one vector.

  Attributes:
    method: name on the menu.
    count: number of models.
    options: fixed options of the method.
    vary: what varies: 'weights' (one a model), 'weight' (one for all models),
      or a numeric option of the method such as 'scale', 't' or 'density'.
    low: least value.
    high: largest value.
    start: where searches begin.
    weights: of the models, where they are not what varies; all 1 by default
      (or as the method says).
    blocks: parts of paths, the last of them '*' for the rest; each block has
      coefficients of its own. One block by default. See `blocks_of`.
  """

  method: str
  count: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  vary: str = 'weights'
  weights: tuple[float, ...] | None = None
  low: float = 0.0
  high: float = 1.0
  start: float = 0.5
  blocks: tuple[str, ...] = ('*',)

  def __post_init__(self):
    arguments = ('weights', 'weight', *named.entry_of(self.method).options)
    if self.vary not in arguments:
      raise errors.ConfigError(
        errors.near(self.vary, arguments, f'argument of {self.method} to vary,')
      )
    if not self.low < self.high or not self.low <= self.start <= self.high:
      raise errors.ConfigError(
        f'A search from {self.low} to {self.high} cannot begin at '
        f'{self.start}: low < high, and the start between them.'
      )
    if len(self.blocks) > 1:
      self._check_blocks()

  def _check_blocks(self):
    """Raises if blocks do not merge each by itself.

    A recipe takes numbers of a whole model over all blocks, and `merge` could
    only take them block by block: the recipe would not be what was scored.
    """
    method = self._method([self.start] * self.per_block)
    if method.has_tree_passes:
      raise errors.ConfigError(
        f'{self.method} with these options looks at a whole model at once '
        '(thresholds or norms over all leaves), so its blocks cannot have '
        'coefficients of their own: search with one block (granularity: '
        'model), or with an option for single leaves (trim_scope: tensor, '
        'normalize_fishers: leaf).'
      )

  @property
  def per_block(self) -> int:
    """Coefficients of one block."""
    return self.count if self.vary == 'weights' else 1

  @property
  def names(self) -> tuple[str, ...]:
    """A name for each coefficient."""
    single = [self.vary] if self.per_block == 1 else [
      f'weight of model {k}' for k in range(self.count)
    ]  # fmt: skip
    if len(self.blocks) == 1:
      return tuple(single)
    return tuple(f'{name} in {b}' for b in self.blocks for name in single)

  def merge(
    self,
    models: Sequence[typing.Tree],
    point: typing.Array,
    *,
    base: typing.Tree | None = None,
    stats: Sequence[Any] | None = None,
    axes: axes_lib.Rules = (),
    dtype: Any = None,
    seed: int = 0,
  ) -> typing.Tree:
    """Merges trees with the coefficients of a point; traceable.

    Args:
      models: trees, `count` of them.
      point: <float>[blocks * per_block].
      base: their ancestor, where the method needs one.
      stats: statistics of each model, where it needs them.
      axes: logical axes of leaves, see `merge`; those of a checkpoint are
        `open_checkpoint(path).axes()`.
      dtype: of the result; by default as the models'.
      seed: of random methods.

    Returns:
      The merged tree.
    """
    methods = [
      self._method(point[i * self.per_block : (i + 1) * self.per_block])
      for i in range(len(self.blocks))
    ]
    rules = [
      (f'.*{re.escape(block)}.*', method)
      for block, method in zip(self.blocks[:-1], methods)
    ]
    return in_memory.merge(
      models, methods[-1], base=base, rules=rules, stats=stats, axes=axes,
      dtype=dtype, seed=seed,
    )  # fmt: skip

  def _method(self, values):
    options = dict(self.options)
    if self.vary not in ('weights', 'weight'):
      options[self.vary] = values[0]
      method = named.resolve(self.method, **options)
      if self.weights is None:
        return method
      return method._replace(default_weights=self.weights)
    method = named.resolve(self.method, **options)
    repeats = 1 if self.vary == 'weights' else self.count
    weights = [values[k] for k in range(self.per_block)] * repeats
    return method._replace(default_weights=tuple(weights))

  def to_recipe(
    self, point: Sequence[float], models: Sequence[str], base: str | None
  ) -> dict[str, Any]:
    """The recipe that merges files with the coefficients of a point."""
    by_block = np.reshape(point, (len(self.blocks), self.per_block)).tolist()

    def setting(k):
      values = [own[min(k, len(own) - 1)] for own in by_block]
      if len(values) == 1:
        return values[0]
      named_blocks = [
        {'filter': block, 'value': value}
        for block, value in zip(self.blocks[:-1], values)
      ]
      return [*named_blocks, {'value': values[-1]}]

    # What a recipe would otherwise take from mergekit is written out.
    entry = named.entry_of(self.method)
    parameters = {
      name: entry.options[name].default
      for name in entry.recipe_defaults
      if entry.options[name].default is not registry.Option.empty
    }
    parameters |= self.options
    entries: list[dict[str, Any]] = [{'model': name} for name in models]
    if self.vary in ('weights', 'weight'):
      for k, item in enumerate(entries):
        item['parameters'] = {'weight': setting(k)}
    else:
      parameters[self.vary] = setting(0)
      for item, weight in zip(entries, self.weights or ()):
        item['parameters'] = {'weight': weight}
    for name, value in list(parameters.items()):
      if isinstance(value, (list, tuple)) and name != self.vary:
        # One a model; in a recipe a list would run along the layers.
        for item, own in zip(entries, parameters.pop(name)):
          item.setdefault('parameters', {})[name] = own
    parameters = {entry.recipe_name(n): v for n, v in parameters.items()}
    recipe: dict[str, Any] = {'merge_method': self.method, 'models': entries}
    if base:
      recipe['base_model'] = base
    if parameters:
      recipe['parameters'] = parameters
    return recipe


def learned_space(
  method: str, coefficients: Mapping[str, typing.Array]
) -> tuple[Space, list[float]]:
  """A space, and the point of it that learned coefficients are.

  Blocks are parts of paths, and `conv/kernel` is a part of
  `layer/conv/kernel`: longer ones come first.

  Args:
    method: 'linear' or 'task_arithmetic'.
    coefficients: `{block: <float>[K]}` from `gradient.learn`.

  Returns:
    `(space, point)` for `Space.merge` and `Space.to_recipe`.
  """
  blocks = sorted((b for b in coefficients if b != '*'), key=lambda b: -len(b))
  count = len(next(iter(coefficients.values())))
  space = Space(
    method, count, blocks=(*blocks, '*'),
    options={'normalize': False} if method == 'linear' else {},
  )  # fmt: skip
  # What is not floating is in no block.
  rest = np.full(count, 1 / count)
  point = [coefficients.get(block, rest) for block in space.blocks]
  return space, np.concatenate(point).astype(float).tolist()


def blocks_of(paths: Sequence[typing.Path]) -> tuple[str, ...]:
  """The blocks of a model: each of its layers, and '*' for everything else.

  Layers that are stacked in one array have no path, and so no block, of their
  own: see `check_unstacked`.

  Example:
    >>> blocks_of(['encoder/layers_0/wi', 'encoder/layers_1/wi', 'norm/scale'])
    ('encoder/layers_0/', 'encoder/layers_1/', '*')
  """
  found = {}
  for path in paths:
    block = known.block_of(path)
    if block:
      found[block] = None
  return (*found, '*')


def check_unstacked(specs: typing.SpecTree) -> None:
  """Raises if leaves are stacks of layers or experts, as far as axes are known.

  Coefficients for each layer or leaf would be others than those of the same
  model with its layers apart.

  Raises:
    StructureError: lists the stacked parameters.
  """
  stacked = [
    f'{path} {list(spec.shape)}: {spec.axes}'
    for path, spec in specs.items()
    if axes_lib.stacked(spec) and known.block_of(path) is None
  ]
  if stacked:
    raise errors.StructureError(
      'These parameters are stacks of layers or experts, none of which can have '
      f'coefficients of its own:\n{errors.listed(stacked)}\nSearch with the '
      'granularity model, or merge models whose layers are stored apart.'
    )
