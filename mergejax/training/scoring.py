# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation inside training: every so many steps, the best model kept."""

from collections.abc import Callable, Mapping, Sequence
import json
import math
from typing import Any

import jax

from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import callbacks
from mergejax.training import checkpoints as checkpoints_lib

_MEAN = 'mean'


def compiled(
  evaluator: Callable[[typing.Tree], Mapping[str, Any]],
) -> Callable[[typing.Tree], Mapping[str, Any]]:
  """A function of parameters; an evaluator (`score`, `data`) as a program."""
  if not hasattr(evaluator, 'score'):
    return evaluator
  score = jax.jit(evaluator.score)
  return lambda params: score(params, evaluator.data)


class evaluate(callbacks.Callback):  # pylint: disable=invalid-name
  """Asks a function for scores of the parameters; a callback.

  The scores are logged as `eval/TASK`, those of an average of the parameters
  as `eval/NAME/TASK`. Where experts train side by side the function is given
  their stacked parameters, and no model of theirs is kept.
  """

  def __init__(
    self,
    fn: Callable[[typing.Tree], Mapping[str, Any]],
    *,
    every: int,
    averages: Sequence[str] = (),
    keep_best: str | None = None,
    lower_is_better: bool = False,
  ):
    """Makes the callback.

    Args:
      fn: `params -> {task: score}`, or nested; every process calls it. Or an
        evaluator, as a suite of tasks gives: its `score` is compiled.
      every: steps between two evaluations; the last step always has one.
      averages: names of step transforms, such as 'ema', whose parameters are
        evaluated beside the live ones.
      keep_best: which score decides which model is kept, as it is logged but
        without `eval/`: 'cola', 'ema/cola', or 'mean', that of all. The best
        model so far stands in `best` of the run's folder, its step and score
        in `best.json`. A score that is no number (NaN) is never the best.
      lower_is_better: the smaller score is the better one.

    Raises:
      ConfigError: a number of steps that is none.
    """
    errors.check_whole('every', every)
    self._fn = compiled(fn)
    self._every = every
    self._averages = tuple(averages)
    self._keep_best = keep_best
    self._sign = -1.0 if lower_is_better else 1.0
    self._best: float | None = None

  def on_start(self, run):
    self._run = run
    for name in self._averages:
      transform = run.transforms.get(name)
      if transform is None or transform.averaged is None:
        known = [n for n, t in run.transforms.items() if t.averaged is not None]
        raise errors.ConfigError(
          errors.near(name, known, 'average of the parameters')
          + ' Give the run a step transform of that name, such as ema(0.999).'
        )
    self._best = None
    if self._keep_best is not None:
      if run.experts is not None:
        raise errors.ConfigError(
          'keep_best keeps one model, but this run trains '
          f'{len(run.experts)} experts side by side: leave it out.'
        )
      file = run.folder('evaluate(keep_best=...)') / 'best.json'
      if file.exists():
        kept = checkpoint.read_json(file)
        # A score of something else says nothing of this one.
        if kept['metric'] == self._keep_best:
          self._best = kept['score']

  def on_step(self, step, state):
    if step % self._every and step != self._run.steps:
      return None
    found, params = {}, {'': state.params}
    for name in self._averages:
      average = self._run.transforms[name].averaged
      if self._run.experts is not None:
        average = jax.vmap(average)
      params[f'{name}/'] = average(state.extras[name], state.params)
    for prefix, these in params.items():
      for path, score in tree.flatten(dict(self._fn(these))).items():
        found[prefix + path] = float(score)
    if self._keep_best is not None:
      self._keep(step, found, params)
    return {callbacks.EVAL + name: score for name, score in found.items()}

  def _keep(self, step, found, params):
    """Writes the model down if it is the best so far."""
    name = self._keep_best
    scores = {_MEAN: sum(found.values()) / max(len(found), 1), **found}
    if name not in scores:
      raise errors.ConfigError(errors.near(name, scores, 'score to keep by'))
    score = scores[name]
    if math.isnan(score):
      return
    if self._best is not None and not (
      self._sign * score > self._sign * self._best
    ):
      return
    self._best = score
    prefix = name.split('/')[0] + '/'
    folder = self._run.folder('evaluate')
    checkpoints_lib.export(
      folder / 'best', self._run.family, params.get(prefix, params[''])
    )
    if jax.process_index() == 0:
      with files.atomic_path(folder / 'best.json', overwrite=True) as temporary:
        kept = {'step': step, 'metric': name, 'score': score}
        temporary.write_text(json.dumps(kept) + '\n')
