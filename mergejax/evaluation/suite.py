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
        metric: accuracy               # or loss, or exact_match
        expert: path/to/expert         # its row is what others are measured by
      news: {text: corpora/news, metric: bits_per_byte}
      digits: {images: vision/mnist}

`max_examples` are a fixed sample of the whole split (see `data.samples`).
Answers are never cut: `lengths` must have room for the longest, with its end
token. A file may serve several splits, which is told.

Instead of `tasks`, `mixture: NAME` with `import: my.module` takes the tasks of
a mixture that the module registers in seqio; `experts: {TASK: path}` then names
their experts, and `metric` is that of all of them.

`accuracy` is the share of whole answers that greedy decoding would get right,
told by one forward pass. `exact_match` decodes: answers are generated, at most
`lengths: targets` tokens, and compared as text. `metric: seqio`, for mixtures,
generates too and calls the tasks' own `metric_fns`, after their
`postprocess_fn`; every number that they return is a column, `TASK` or
`TASK/NUMBER`. `lower_is_better: [NUMBER, ...]` names those that are losses.
Both decode greedily, or as `decoding: {beams: 4, alpha: 0.6}` or `decoding:
{temperature: 0.7, top_k: 40, seed: 0}` says, see `beam.Beam`, `sampling.Sample`.
"""

from collections.abc import Mapping
import importlib
import os
import pathlib
from typing import Any

import seqio
import yaml

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import splits
from mergejax.data import tables
from mergejax.data import tasks as tasks_lib
from mergejax.evaluation import generated
from mergejax.evaluation import metrics
from mergejax.evaluation import scoring

_TOP = (
  'vocabulary', 'lengths', 'batch_size', 'max_examples', 'base', 'tasks',
  'mixture', 'import', 'metric', 'experts', 'lower_is_better', 'decoding',
)  # fmt: skip
_TASK = ('files', 'inputs', 'targets', 'text', 'images', 'metric', 'expert')


def load(source: os.PathLike | str | Mapping[str, Any]) -> scoring.Suite:
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
    raise error.at(path) from error


def of_mixture(
  name: Any,
  *,
  lengths: Mapping[str, int] | None,
  split: str | None = None,
  metric: str | None = None,
  batch_size: int = 32,
  max_examples: int | None = 512,
  decoding: Mapping[str, Any] | None = None,
) -> scoring.Suite:
  """A suite of the tasks of a mixture, or of one task, registered in seqio.

  Args:
    name: of the mixture or task, or what registered one and has a `name`.
    lengths: tokens of `inputs` and `targets`; None: of the longest examples of
      `split`, all of which are read for it.
    split: only asked for that.
    metric: of all tasks; 'accuracy' by default, of plain text 'bits_per_byte'.
    batch_size: rows of a batch.
    max_examples: of each task, a fixed sample; None takes all.
    decoding: how answers are generated, see `generated.parse_decoding`.

  Raises:
    UserError: an unknown name, a metric that does not fit, or neither lengths
      nor a split.
  """
  name = getattr(name, 'name', name)
  if lengths is None:
    if split is None:
      raise errors.ConfigError(
        'A suite of a mixture needs lengths, or a split to take the lengths of '
        'the longest examples of.'
      )
    lengths = splits.longest(name, split)
  words: dict[str, Any] = {'metric': metric} if metric else {}
  if decoding:
    words['decoding'] = decoding
  return _parse({
    'mixture': name, 'lengths': dict(lengths), 'batch_size': batch_size,
    'max_examples': max_examples, **words,
  })  # fmt: skip


def of_corpora(
  tasks: Mapping[str, str],
  *,
  length: int,
  batch_size: int = 32,
  max_sequences: int | None = 256,
  vocabulary: Any = None,
) -> scoring.Suite:
  """A suite of plain text, scored in bits per byte.

  Args:
    tasks: `{domain: name of a text task in seqio}`, from `tasks.add_corpora`.
    length: tokens of a row.
    batch_size: rows of a batch.
    max_sequences: rows of each domain, a fixed sample; None takes all.
    vocabulary: that of the tasks.
  """
  return scoring.Suite(
    {
      domain: scoring.Task('bits_per_byte', 'lm', source)
      for domain, source in tasks.items()
    },
    {'targets': length},
    batch_size,
    max_sequences,
    vocabulary,
  )


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
  for word in ('import', 'metric', 'experts', 'lower_is_better'):
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
  return scoring.Suite(
    found,
    _lengths(data.get('lengths', {})),
    scoring.check_count('batch_size', data.get('batch_size', 32)),
    scoring.check_count(
      'max_examples', data.get('max_examples', 512), optional=True
    ),
    vocabulary,
    data.get('base'),
    _decoding(data.get('decoding', {}), found),
  )


def _decoding(given, tasks):
  """How the answers of tasks are generated, checked."""
  if not isinstance(given, Mapping):
    raise errors.ConfigError(
      'decoding must be a mapping, such as {beams: 4} or {temperature: 0.7, '
      f'top_k: 40}}, not {given!r}.'
    )
  generated.parse_decoding(given)
  if given and not any(t.metric in generated.NAMES for t in tasks.values()):
    raise errors.ConfigError(
      'decoding says how answers are generated, but no task of the suite is '
      f'scored by what is generated ({", ".join(generated.NAMES)}): leave it '
      'out, or change a metric.'
    )
  return dict(given)


def _lengths(given):
  """Tokens of inputs and targets; 64 where nothing is said."""
  _known(given, ('inputs', 'targets'), 'lengths')
  for word, value in given.items():
    scoring.check_count(f'lengths: {word}', value)
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
  if metric == 'seqio':
    raise errors.ConfigError(
      f"task {name}: 'metric: seqio' calls the functions that a task was "
      "registered with; one of files has none. Take 'exact_match'."
    )
  source = str(data[sources[0]])
  if kind == 'encoder_decoder':
    for word in ('inputs', 'targets'):
      if word not in data:
        raise errors.ConfigError(f"task {name} lacks the template '{word}'.")
    source = tasks_lib.add_table_task(
      f'suite_{name}',
      tables.split_files(source, scoring.SPLITS),
      inputs=data['inputs'],
      targets=data['targets'],
      vocabulary=vocabulary,
      by_content=True,
    ).name
  elif kind == 'lm':
    source = tasks_lib.add_text_task(
      f'suite_{name}',
      tables.split_files(source, scoring.SPLITS),
      vocabulary=vocabulary,
      by_content=True,
    ).name
  else:
    tasks_lib.locate(source)
  return scoring.Task(metric, kind, source, data.get('expert'))


def _check_metric(metric, kind, name):
  known = (*metrics.METRICS, *generated.NAMES)
  if metric not in known:
    raise errors.ConfigError(
      errors.near(str(metric), known, f'metric of {name},')
    )
  if metric == 'bits_per_byte' and kind != 'lm':
    raise errors.ConfigError(
      f'task {name}: bits_per_byte is of language models.'
    )
  if metric in generated.NAMES and kind != 'encoder_decoder':
    raise errors.ConfigError(
      f'task {name}: {metric} is of generated answers to inputs, which '
      f'{"images" if kind == "images" else "plain text"} does not have.'
    )


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
  lower = data.get('lower_is_better', [])
  if not isinstance(lower, list) or (lower and data.get('metric') != 'seqio'):
    raise errors.ConfigError(
      f"lower_is_better is a list of numbers of 'metric: seqio', not {lower!r}."
    )
  result = {}
  for task in members:
    kind = 'encoder_decoder' if 'inputs' in task.output_features else 'lm'
    metric = data.get('metric', 'bits_per_byte' if kind == 'lm' else 'accuracy')
    _check_metric(metric, kind, task.name)
    if metric == 'seqio':
      generated.check_functions(task)
    result[task.name] = scoring.Task(
      metric, kind, task.name, experts.get(task.name), tuple(lower)
    )
  return result
