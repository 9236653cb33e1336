# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Suites: the tasks that models are scored on, as data.

    vocabulary: bytes                  # or the path of a SentencePiece .model
    lengths: {inputs: 64, targets: 8}
    batch_size: 32
    max_examples: 512                  # of each task
    base: path/to/base                 # always a row of the table
    tasks:
      books:
        files: tasks/sentiment_books   # a folder of {train,validation,test}.tsv
        inputs: 'sentiment: {text}'
        targets: '{label}'
        metric: accuracy               # or loss
        expert: path/to/expert         # its row is what others are measured by
      news: {text: corpora/news, metric: bits_per_byte}
      digits: {images: vision/mnist}

`max_examples` are a fixed sample of the whole split (see `data.samples`).
Answers are never cut: `lengths` must have room for the longest, with its end
token. A file may serve several splits, which is told.

Instead of `tasks`, `mixture: NAME` with `import: my.module` takes the tasks of
a mixture that the module registers in seqio; `experts: {TASK: path}` then names
their experts, and `metric` is that of all of them.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import importlib
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import seqio
import yaml

from mergejax import models
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import typing
from mergejax.data import features
from mergejax.data import identity
from mergejax.data import images
from mergejax.data import rows
from mergejax.data import stream
from mergejax.data import tasks as tasks_lib
from mergejax.evaluation import scores
from mergejax.search import base as search_base
from mergejax.select import bayes
from mergejax.training import losses

METRICS = ('accuracy', 'loss', 'bits_per_byte')
LOWER_IS_BETTER = ('loss', 'bits_per_byte')
_TOP = (
  'vocabulary', 'lengths', 'batch_size', 'max_examples', 'base', 'tasks',
  'mixture', 'import', 'metric', 'experts',
)  # fmt: skip
_TASK = ('files', 'inputs', 'targets', 'text', 'images', 'metric', 'expert')
SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Task:
  """One task of a suite.

  Attributes:
    metric: 'accuracy': the share of examples whose whole answer greedy decoding
      gets right (one forward pass tells: every target token must be the most
      likely one after those before it). 'loss': nats per target token.
      'bits_per_byte': of language models.
    kind: 'encoder_decoder', 'lm' or 'images'.
    source: seqio's name of the task (its own name and a digest of its content,
      so that suites do not share tasks), or the folder of the images.
    expert: checkpoint of the task's own expert, or None.
  """

  metric: str
  kind: str
  source: str
  expert: str | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
  """Tasks, and how they are read; from `load`."""

  tasks: Mapping[str, Task]
  lengths: Mapping[str, int]
  batch_size: int
  max_examples: int | None
  vocabulary: Any
  base: str | None = None

  def batches(
    self, name: str, split: str, limit: int | None = None
  ) -> list[dict[str, np.ndarray]]:
    """Batches of equal shape of one task; a fixed sample if there is a limit.

    Raises:
      UserError: an unknown task or split.
    """
    task = self._task(name)
    if split not in SPLITS:
      raise errors.ConfigError(errors.near(split, SPLITS, 'split'))
    limit = self.max_examples if limit is None else limit
    _check_count('max_examples', limit, optional=True)
    if task.kind == 'images':
      return images.batches(
        images.load(task.source, split), self.batch_size, limit
      )
    found = stream.evaluation_batches(
      task.source, lengths=self._lengths(task), batch_size=self.batch_size, split=split,
      kind=task.kind, max_examples=limit, answers=task.metric == 'accuracy',
    )  # fmt: skip
    if task.metric == 'bits_per_byte' and 'num_bytes' not in found[0]:
      raise errors.ConfigError(
        f'task {name}: nothing tells how many bytes of text its tokens stand '
        "for, which 'bits_per_byte' divides by. Register it with "
        'tasks.add_text_task and bytes or a SentencePiece model, or score '
        "'loss'."
      )
    return found

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
    lengths = self._lengths(task)
    found = identity.describe(task.source, split, lengths)
    return {**about, 'lengths': lengths, **found}

  def _lengths(self, task):
    """Tokens of each feature of a task."""
    wanted = ('targets',) if task.kind == 'lm' else ('inputs', 'targets')
    return {name: self.lengths[name] for name in wanted}

  def lower_is_better(self) -> list[str]:
    """Tasks whose score is a loss."""
    return [n for n, t in self.tasks.items() if t.metric in LOWER_IS_BETTER]

  def describe_metrics(self) -> str:
    """What the numbers of a table are, in a line."""
    tasks: dict[str, list[str]] = {}
    for name, task in self.tasks.items():
      tasks.setdefault(task.metric, []).append(name)
    words = {
      metric: metric.replace('_', ' ')
      + (' (lower is better)' if metric in LOWER_IS_BETTER else '')
      for metric in tasks
    }
    if len(tasks) == 1:
      return words.popitem()[1]
    return '; '.join(
      f'{words[metric]}: {", ".join(names)}' for metric, names in tasks.items()
    )

  def _task(self, name):
    if name not in self.tasks:
      raise errors.ConfigError(errors.near(name, self.tasks, 'task'))
    return self.tasks[name]

  def evaluator(
    self, module: nn.Module, split: str, names: Sequence[str] | None = None
  ) -> search_base.Evaluator:
    """Scores of parameters, compiled with a merge; higher is better.

    Losses and bits per byte are negated.
    """
    names = list(names or self.tasks)
    data = {}
    for name in names:
      batches = self.batches(name, split)
      self._check_known(module, name, batches)
      data[name] = _stacked(batches)

    def score(params, data):
      result = {}
      for name in names:
        metric = self._task(name).metric

        def one(batch, metric=metric):
          return example_scores(module, params, batch, metric)

        up, down = jax.lax.map(one, data[name])
        value = jnp.sum(up) / jnp.maximum(jnp.sum(down), 1e-30)
        result[name] = -value if metric in LOWER_IS_BETTER else value
      return result

    return search_base.Evaluator(score, jax.device_put(data))

  def _check_known(self, module, name, batches):
    """Raises for classes and tokens that a model does not have."""
    for batch in batches:
      if self._task(name).kind == 'images':
        bayes.check_classes(batch['labels'], module.config.classes)
      else:
        models.check_batch(module, batch, f'task {name}')

  def table(
    self,
    rows: Iterable[tuple[str, nn.Module, typing.Tree]],
    split: str = 'test',
    names: Sequence[str] | None = None,
  ) -> scores.Table:
    """Raw scores with bootstrap intervals.

    Args:
      rows: `(name, module, params)` of each model, which may come one by one.
      split: the split to score on.
      names: tasks; all by default.

    Returns:
      `{model: {task: Score}}`, in the metrics' own direction.
    """
    names = list(names or self.tasks)
    # What is wrong with the data is told before the first model is read.
    data = {name: self.batches(name, split) for name in names}
    result: dict[str, dict[str, scores.Score]] = {}
    compiled = {}
    for row, module, params in rows:
      result[row] = {}
      params = jax.device_put(params)
      for name in names:
        metric = self._task(name).metric
        self._check_known(module, name, data[name])
        if (module, metric) not in compiled:
          compiled[module, metric] = jax.jit(
            lambda p, b, module=module, metric=metric: example_scores(
              module, p, b, metric
            )
          )
        pairs = [compiled[module, metric](params, b) for b in data[name]]
        up, down = (np.concatenate([np.asarray(p[i]) for p in pairs]) for i in (0, 1))  # fmt: skip
        result[row][name] = scores.bootstrap(up, down)
    return result


def example_scores(
  module: nn.Module, params: typing.Tree, batch: Mapping[str, Any], metric: str
) -> tuple[jax.Array, jax.Array]:
  """`(numerators, denominators)`, <float32>[batch] each, of one batch."""
  logits = models.logits(module, params, batch)
  targets, weights = models.targets(batch), models.target_weights(batch)
  flat = lambda x: x.reshape(x.shape[0], -1)
  weights = flat(weights)
  if metric == 'accuracy':
    right = flat(jnp.argmax(logits, axis=-1) == targets) | (weights == 0)
    real = (jnp.max(weights, axis=1) > 0).astype(jnp.float32)
    return jnp.all(right, axis=1).astype(jnp.float32) * real, real
  loss, _ = losses.token_cross_entropy(logits, targets)
  nats = jnp.sum(flat(loss) * weights, axis=1)
  if metric == 'loss':
    return nats, jnp.sum(weights, axis=1)
  return nats / np.log(2), jnp.asarray(batch['num_bytes'], jnp.float32)


def _stacked(batches):
  return {
    name: np.stack([batch[name] for batch in batches]) for name in batches[0]
  }


def load(source: os.PathLike | str | Mapping[str, Any]) -> Suite:
  """Reads and checks a suite: a YAML file, or what one holds.

  Raises:
    UserError: the file is missing or not YAML, unknown words (near ones are
      offered), files or columns that do not exist.
  """
  if isinstance(source, Mapping):
    return _parse(source)
  path = pathlib.Path(source)
  if not path.is_file():
    raise errors.ConfigError(f'There is no suite at {path}.')
  try:
    data = yaml.safe_load(path.read_text(encoding='utf-8'))
    return _parse(data)
  except yaml.YAMLError as error:
    raise errors.ConfigError(f'{path} is not YAML: {error}') from error
  except errors.UserError as error:
    raise errors.ConfigError(f'{path}: {error.message}') from error


def _known(data, words, what):
  if not isinstance(data, Mapping):
    raise errors.ConfigError(f'{what} must be a mapping, not {data!r}.')
  for word in data:
    if word not in words:
      raise errors.ConfigError(
        errors.near(str(word), words, f'word of {what},')
      )


def _parse(data):
  _known(data, _TOP, 'a suite')
  vocabulary = data.get('vocabulary', 'bytes')
  if vocabulary != 'bytes':
    vocabulary = tasks_lib.locate(vocabulary)
  vocabulary = features.vocabulary(vocabulary)
  if ('tasks' in data) == ('mixture' in data):
    raise errors.ConfigError("a suite has either 'tasks' or a 'mixture'.")
  for word in ('import', 'metric', 'experts'):
    if word in data and 'mixture' not in data:
      raise errors.ConfigError(
        f'{word!r} is for a mixture; give it to each task.'
      )
  if 'tasks' in data:
    _known(data['tasks'], data['tasks'], 'tasks')
    found = {
      str(name): _parse_task(str(name), one, vocabulary)
      for name, one in data['tasks'].items()
    }
    if not found:
      raise errors.ConfigError('a suite has at least one task.')
  else:
    found = _mixture(data)
  return Suite(
    found,
    _lengths(data.get('lengths', {})),
    _check_count('batch_size', data.get('batch_size', 32)),
    _check_count('max_examples', data.get('max_examples', 512), optional=True),
    vocabulary,
    data.get('base'),
  )


def _check_count(word, value, optional=False):
  if value is None and optional:
    return value
  whole = isinstance(value, int) and not isinstance(value, bool)
  if not whole or value < 1:
    raise errors.ConfigError(f'{word} must be 1 or more, not {value!r}.')
  return value


def _lengths(given):
  """Tokens of inputs and targets; 64 where nothing is said."""
  _known(given, ('inputs', 'targets'), 'lengths')
  for word, value in given.items():
    _check_count(f'lengths: {word}', value)
  return {'inputs': 64, 'targets': 64, **given}


def _parse_task(name, data, vocabulary):
  _known(data, _TASK, f'task {name}')
  sources = [word for word in ('files', 'text', 'images') if word in data]
  if len(sources) != 1:
    raise errors.ConfigError(
      f"task {name} needs one of 'files', 'text' and 'images'."
    )
  kind = {'files': 'encoder_decoder', 'text': 'lm', 'images': 'images'}[
    sources[0]
  ]
  default = 'bits_per_byte' if kind == 'lm' else 'accuracy'
  metric = data.get('metric', default)
  _check_metric(metric, kind, name)
  source = str(data[sources[0]])
  if kind == 'encoder_decoder':
    for word in ('inputs', 'targets'):
      if word not in data:
        raise errors.ConfigError(f"task {name} lacks the template '{word}'.")
    source = tasks_lib.add_table_task(
      f'suite_{name}', _split_files(source), inputs=data['inputs'],
      targets=data['targets'], vocabulary=vocabulary, by_content=True,
    ).name  # fmt: skip
  elif kind == 'lm':
    source = tasks_lib.add_text_task(
      f'suite_{name}', _split_files(source), vocabulary=vocabulary,
      by_content=True,
    ).name  # fmt: skip
  else:
    tasks_lib.locate(source)
  return Task(metric, kind, source, data.get('expert'))


def _check_metric(metric, kind, name):
  if metric not in METRICS:
    raise errors.ConfigError(errors.near(str(metric), METRICS, f'metric of {name},'))  # fmt: skip
  if metric == 'bits_per_byte' and kind != 'lm':
    raise errors.ConfigError(
      f'task {name}: bits_per_byte is of language models.'
    )


def _split_files(source):
  """`{split: file}` of a folder, or of one file that serves every split."""
  path = tasks_lib.locate(source)
  if path.is_file():
    return {split: path for split in SPLITS}
  files = {}
  for split in SPLITS:
    found = [path / f'{split}{suffix}' for suffix in rows.SUFFIXES]
    found = [file for file in found if file.is_file()]
    if len(found) > 1:
      raise errors.ConfigError(
        f'{path} holds more than one {split} file: '
        f'{", ".join(file.name for file in found)}. Leave one.'
      )
    if found:
      files[split] = found[0]
  if not files:
    raise errors.ConfigError(
      f'{path} holds no train, validation or test file '
      f'({", ".join(rows.SUFFIXES)}).'
    )
  return files


def _mixture(data):
  if 'import' in data:
    try:
      importlib.import_module(data['import'])
    except ImportError as error:
      raise errors.ConfigError(
        f'{data["import"]}, which should register the mixture, cannot be '
        f'imported: {error}.'
      ) from error
  name = data['mixture']
  known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  if name not in known:
    raise errors.ConfigError(errors.near(str(name), known, 'seqio mixture'))
  members = seqio.get_subtasks(seqio.get_mixture_or_task(name))
  experts = data.get('experts') or {}
  _known(experts, [task.name for task in members], 'experts')
  result = {}
  for task in members:
    kind = 'encoder_decoder' if 'inputs' in task.output_features else 'lm'
    metric = data.get('metric', 'bits_per_byte' if kind == 'lm' else 'accuracy')
    _check_metric(metric, kind, task.name)
    result[task.name] = Task(metric, kind, task.name, experts.get(task.name))
  return result
