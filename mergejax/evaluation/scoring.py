# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tasks with their data, and the tables and evaluators that come of them."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import labels
from mergejax.core import typing
from mergejax.data import identity
from mergejax.data import images
from mergejax.data import splits
from mergejax.evaluation import base as base_lib
from mergejax.evaluation import columns
from mergejax.evaluation import decode
from mergejax.evaluation import generated
from mergejax.evaluation import metrics

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a suite.

  Attributes:
    metric: 'accuracy': the share of examples whose whole answer greedy decoding
      gets right (one forward pass tells: every target token must be the most
      likely one after those before it). 'loss': nats per target token.
      'bits_per_byte': of language models. 'exact_match': the share of examples
      whose generated text is that of the target. 'seqio': all numbers of the
      task's own metric functions, see `generated`.
    kind: 'encoder_decoder', 'lm' or 'images'.
    source: seqio's name of the task (its own name and a digest of its content,
      so that suites do not share tasks), or the folder of the images.
    expert: checkpoint of the task's own expert, or None.
    lower_is_better: numbers of the metric functions of which less is better.
  """

  metric: str
  kind: str
  source: str
  expert: str | None = None
  lower_is_better: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Suite:
  """Tasks, and how they are read.

  `suite.load` reads one from a file; `suite.of_corpora` and `suite.of_mixture`
  make one.

  Attributes:
    tasks: by name.
    lengths: tokens of `inputs` and `targets`.
    batch_size: rows of a batch.
    max_examples: of each task, a fixed sample; None takes all.
    vocabulary: of the text.
    base: checkpoint that is always a row of the table, or None.
    decoding: how answers are generated, see `generated.parse_decoding`.
  """

  tasks: Mapping[str, Task]
  lengths: Mapping[str, int]
  batch_size: int
  max_examples: int | None
  vocabulary: Any
  base: str | None = None
  decoding: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def batches(
    self,
    name: str,
    split: str,
    limit: int | None = None,
    *,
    kind: str | None = None,
  ) -> list[dict[str, np.ndarray]]:
    """Batches of equal shape of one task; a fixed sample if there is a limit.

    Args:
      name: of the task.
      split: 'train', 'validation' or 'test'.
      limit: most examples, instead of the suite's.
      kind: of the features, instead of the task's; see `kind_for`.

    Raises:
      UserError: an unknown task or split.
    """
    task = self._task(name)
    if split not in SPLITS:
      raise errors.ConfigError(errors.near(split, SPLITS, 'split'))
    if limit is None:
      limit = self.max_examples
    else:
      check_count('max_examples', limit)
    if task.kind == 'images':
      return images.batches(
        images.load(task.source, split), self.batch_size, limit
      )
    whole = task.metric in ('accuracy', 'exact_match')
    found = splits.batches(
      task.source, lengths=self._lengths(task), batch_size=self.batch_size,
      split=split, kind=kind or task.kind, max_examples=limit, answers=whole,
    )  # fmt: skip
    if task.metric == 'bits_per_byte' and 'num_bytes' not in found[0]:
      raise errors.ConfigError(
        f'task {name}: nothing tells how many bytes of text its tokens stand '
        "for, which 'bits_per_byte' divides by. Register it with "
        'tasks.add_text_task and bytes or a SentencePiece model, or score '
        "'loss'."
      )
    return found

  def kind_for(self, name: str, model: nn.Module | models.ModelFamily) -> str:
    """The kind of features that a model takes of a task.

    A decoder-only model reads inputs as the prefix of its targets.
    """
    kind = self._task(name).kind
    if kind == 'encoder_decoder' and decode.is_decoder_only(
      models.family_of(model)
    ):
      return 'prefix_lm'
    return kind

  def read(
    self,
    split: str,
    names: Iterable[str] | None = None,
    limit: int | None = None,
    *,
    model: nn.Module | models.ModelFamily | None = None,
  ) -> dict[str, list[dict[str, np.ndarray]]]:
    """`{task: batches}` of several tasks, all by default; see `batches`.

    Args:
      split: 'train', 'validation' or 'test'.
      names: tasks; all by default.
      limit: most examples of each task, instead of the suite's.
      model: whose kind of features is wanted, see `kind_for`; by default the
        tasks' own.
    """
    kind = lambda name: None if model is None else self.kind_for(name, model)
    return {
      name: self.batches(name, split, limit, kind=kind(name))
      for name in names or self.tasks
    }

  def content(self, name: str, split: str) -> dict[str, Any]:
    """What fixes the scores of a task, as plain data: see `identity.describe`.

    Raises:
      UserError: an unknown task, or images that are missing.
    """
    task = self._task(name)
    about = {'metric': task.metric, 'batch_size': self.batch_size}
    about['max_examples'] = self.max_examples
    if task.kind == 'images':
      file = images.path(task.source, split)
      return {**about, 'files': f'{file.name} {checksums.SUMS.of(file)[:16]}'}
    if task.metric in generated.NAMES and self.decoding:
      about['decoding'] = dict(self.decoding)
    lengths = self._lengths(task)
    found = identity.describe(task.source, split, lengths)
    return {**about, 'lengths': lengths, **found}

  def _lengths(self, task):
    """Tokens of each feature of a task."""
    wanted = ('targets',) if task.kind == 'lm' else ('inputs', 'targets')
    return {name: self.lengths[name] for name in wanted}

  def lower_is_better(self) -> list[str]:
    """Tasks whose score is a loss."""
    return [
      name
      for name, task in self.tasks.items()
      if task.metric != 'seqio' and not self.metric(name).higher_is_better
    ]

  def describe_metrics(self, names: Iterable[str] | None = None) -> str:
    """What the numbers of a table are, in a line; of all tasks by default."""
    tasks: dict[str, list[str]] = {}
    for name in names or self.tasks:
      words = "seqio's own metrics"
      if self._task(name).metric != 'seqio':
        words = self.metric(name).describe()
      tasks.setdefault(words, []).append(name)
    if len(tasks) == 1:
      return next(iter(tasks))
    return '; '.join(
      f'{words}: {", ".join(members)}' for words, members in tasks.items()
    )

  def experts(self, table: base_lib.Table) -> dict[str, str]:
    """`{column: checkpoint of its task's own expert}`, where there is one."""
    return {
      column: task.expert
      for column in table.tasks
      for name, task in self.tasks.items()
      if task.expert and (column == name or column.startswith(f'{name}/'))
    }

  def metric(self, name: str) -> base_lib.Metric:
    """What a task is scored by.

    Raises:
      ConfigError: an unknown task, or one scored by functions of seqio, which
        may return several numbers.
    """
    metric = self._task(name).metric
    if metric == 'seqio':
      raise errors.ConfigError(
        f'task {name} is scored by metric functions of seqio, which may return '
        'several numbers: see its columns of a table.'
      )
    known = {**metrics.METRICS, 'exact_match': generated.EXACT_MATCH}
    return known[metric]

  def _task(self, name):
    if name not in self.tasks:
      raise errors.ConfigError(errors.near(name, self.tasks, 'task'))
    return self.tasks[name]

  def evaluator(
    self,
    model: nn.Module | models.ModelFamily,
    split: str,
    names: Sequence[str] | None = None,
  ) -> base_lib.Evaluator:
    """Scores of parameters, compiled with a merge; higher is better.

    Losses and bits per byte are negated.

    Raises:
      ConfigError: a task that is scored by generated text.
    """
    family = models.family_of(model)
    names = list(names or self.tasks)
    for name in names:
      self.check_compiles(name)
    data = {}
    for name, batches in self.read(split, names, model=family).items():
      self.check_known(family, name, batches)
      data[name] = _stacked(batches)

    def score(params, data):
      result = {}
      for name in names:
        metric = self.metric(name)

        def one(batch, metric=metric):
          return metrics.example_scores(family, params, batch, metric.name)

        up, down = jax.lax.map(one, data[name])
        value = jnp.sum(up) / jnp.maximum(jnp.sum(down), 1e-30)
        result[name] = value if metric.higher_is_better else -value
      return result

    return base_lib.Evaluator(score, jax.device_put(data))

  def check_compiles(self, name: str) -> None:
    """Raises if the score of a task cannot be compiled with a merge."""
    metric = self._task(name).metric
    if metric in generated.NAMES:
      raise errors.ConfigError(
        f'task {name} is scored by generated text ({metric}), which cannot be '
        "compiled with a merge: search on 'accuracy' (the same for whole "
        "answers) or 'loss', and evaluate the result by what it says."
      )

  def check_known(
    self,
    family: models.ModelFamily,
    name: str,
    batches: Sequence[Mapping[str, Any]],
  ) -> None:
    """Raises for classes and tokens that a model does not have."""
    for batch in batches:
      if self._task(name).kind == 'images':
        classes = getattr(family.config, 'classes', None)
        labels.check_classes(batch['labels'], classes)
      family.check_batch(batch, f'task {name}')

  def by_generation(
    self, name: str, split: str, mesh: jax.sharding.Mesh | None = None
  ) -> generated.Generated:
    """How a task is scored by what models say, its rows over a mesh."""
    task = self._task(name)
    return generated.Generated(
      task.source, split, self._lengths(task), self.max_examples,
      task.lower_is_better, self.decoding, mesh,
    )  # fmt: skip

  def table(
    self,
    rows: Iterable[tuple[str, nn.Module | models.ModelFamily, typing.Tree]],
    split: str = 'test',
    names: Sequence[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> base_lib.Table:
    """Raw scores with bootstrap intervals.

    Args:
      rows: `(name, module or family, params)` of each model, which may come one
        by one.
      split: the split to score on.
      names: tasks; all by default.
      mesh: where the parameters lie, if that is several devices: the rows of
        a batch are spread over its `data`.

    Returns:
      Scores in the metrics' own direction.
    """
    # What is wrong with the data is told before the first model is read.
    scored = [
      columns.Scored(self, name, split, mesh) for name in names or self.tasks
    ]
    result: dict[str, dict[str, base_lib.Score]] = {}
    for row, model, params in rows:
      family = models.family_of(model)
      params = jax.device_put(params) if mesh is None else params
      result[row] = {}
      for task in scored:
        result[row] |= task.columns(family, params)
    return base_lib.Table(result)


def check_count(word: str, value: Any, optional: bool = False) -> Any:
  """A whole number of 1 or more, or None if `optional`.

  Raises:
    ConfigError: something else.
  """
  if value is not None or not optional:
    errors.check_whole(word, value)
  return value


def _stacked(batches):
  return {
    name: np.stack([batch[name] for batch in batches]) for name in batches[0]
  }
