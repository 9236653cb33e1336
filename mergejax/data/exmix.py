# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""ExMix: very many labelled tasks, mixed with denoising, as ExT5 has it.

With e_i examples, task i has the rate `r_i = min(e_i, 300000)`; beside all of
them stands denoising at ratio R: an example is one of denoising with
probability `R / (1 + R)`, one of task i with `r_i / (sum r (1 + R))`. ExT5 has
R = 2. It is a mixture of two mixtures, `[(labelled, 1), (denoising, R)]`.

There is one loss over the mixed batch and no weight by task: long targets count
for more, unless the loss is normalised `AVERAGE_PER_SEQUENCE`.

Source: Aribandi et al. (2022), https://arxiv.org/abs/2111.10952, section 3.1.
What is known of the tasks, and how sure that is, stands in `exmix_table`.
"""

from collections.abc import Mapping, Sequence
import functools
import logging
import math

import numpy as np
import seqio

from mergejax.core import errors
from mergejax.data import exmix_table
from mergejax.data import mixtures
from mergejax.data import postprocessors
from mergejax.data import t5_tasks
from mergejax.data import text_metrics
from mergejax.data import text_preprocessors as text
from mergejax.data import tfds_sets

CAP = 300_000
RATIO = 2.0
_NLI = ('entailment', 'neutral', 'contradiction')
_SPLITS = {'train': 'train', 'validation': 'validation'}
_TRAIN_TEST = {'train': 'train', 'test': 'test'}
# Sets whose splits are others.
_OTHER_SPLITS = {
  'reddit_tifu': {'train': 'train'},
  'winogrande': {'train': 'train_xl', 'validation': 'validation'},
  **dict.fromkeys(
    ('ag_news', 'billsum', 'cfq', 'imdb', 'scan', 'web_questions',
     'yelp_polarity'),
    _TRAIN_TEST,
  ),
}  # fmt: skip
_METRICS = {
  'accuracy': text_metrics.accuracy,
  'bleu': text_metrics.bleu,
  'rouge': text_metrics.rouge,
  'sequence': text_metrics.sequence_accuracy,
  'squad': text_metrics.squad,
}


def beside_denoising(
  name: str,
  tasks: Sequence[str],
  *,
  denoising: seqio.Task | seqio.Mixture | str | None = None,
  ratio: float = RATIO,
  cap: float | None = CAP,
  temperature: float = 1.0,
  scale: float = 1.0,
) -> seqio.Mixture:
  """A mixture of labelled tasks of any kind with denoising beside them.

  Args:
    name: a digest of the content is appended.
    tasks: names of registered tasks.
    denoising: what stands beside them: `pretraining.corpora_mixture()`; None
      only at ratio 0.
    ratio: R, examples of denoising for one of the tasks: 0 is none of it, inf
      nothing else.
    cap: see `mixtures.rate`; ExT5's 300,000.
    temperature: likewise; ExT5's 1.
    scale: likewise.

  Returns:
    The mixture.

  Raises:
    DataError: see `mixtures.add_mixture`; a ratio that is none, or one without
      a denoising task.
  """
  if not ratio >= 0:
    raise errors.DataError(
      f'The ratio of denoising is 0 or more (inf is nothing else), not {ratio}.'
    )
  if ratio and denoising is None:
    raise errors.DataError(
      f'Denoising at ratio {ratio} needs a task: denoising=, for example '
      'pretraining.corpora_mixture(), or ratio=0 for none.'
    )
  options = dict(cap=cap, temperature=temperature, scale=scale)
  parts = {}
  if not math.isinf(ratio):
    labelled = mixtures.add_mixture(
      f'{name}_labelled', list(tasks), by_content=True, **options
    )
    parts[labelled.name] = 1.0
  if ratio:
    other = getattr(denoising, 'name', denoising)
    parts[other] = 1.0 if math.isinf(ratio) else float(ratio)
  return mixtures.add_mixture(name, parts, by_content=True)


def select(
  *,
  families: Sequence[str] | None = None,
  count: int | None = None,
  seed: int = 0,
  exclude: Sequence[str] = (),
) -> list[exmix_table.Row]:
  """Rows of the table, by family and at random.

  Args:
    families: of `exmix_table.FAMILIES`; all by default.
    count: so many of them; of one seed, fewer are part of more.
    seed: of which they are.
    exclude: names to leave out, for example what is evaluated on.

  Raises:
    DataError: an unknown family or name, or more than there are.
  """
  for family in families or ():
    if family not in exmix_table.FAMILIES:
      raise errors.DataError(
        errors.near(family, exmix_table.FAMILIES, 'family of tasks')
      )
  for name in exclude:
    if name not in exmix_table.TASKS:
      raise errors.DataError(
        errors.near(name, exmix_table.TASKS, 'task of ExMix')
      )
  rows = [
    row
    for name, row in sorted(exmix_table.TASKS.items())
    if name not in exclude and row.family in (families or exmix_table.FAMILIES)
  ]
  if count is None:
    return rows
  if not 1 <= count <= len(rows):
    raise errors.DataError(f'Of {len(rows)} tasks {count} cannot be chosen.')
  order = np.random.default_rng(seed).permutation(len(rows))
  return [rows[i] for i in np.sort(order[:count])]


def exmix(
  name: str = 'exmix',
  *,
  denoising: seqio.Task | seqio.Mixture | str | None = None,
  ratio: float = RATIO,
  families: Sequence[str] | None = None,
  count: int | None = None,
  seed: int = 0,
  exclude: Sequence[str] = (),
  tasks: Mapping[str, str] | None = None,
  missing: str = 'error',
  cap: float | None = CAP,
  temperature: float = 1.0,
  vocabulary: seqio.Vocabulary | None = None,
  data_dir: str | None = None,
) -> seqio.Mixture:
  """The ExMix mixture, as far as its data are on this machine.

  Args:
    name: a digest of the content is appended.
    denoising: see `beside_denoising`.
    ratio: likewise.
    families: see `select`.
    count: likewise.
    seed: likewise.
    exclude: likewise.
    tasks: `{task of ExMix: task of yours in seqio}`, for those that this
      package cannot make, or to be used instead.
    missing: `'error'`, or `'skip'` to go on without the tasks that cannot be
      had; both tell all of them at once.
    cap: see `mixtures.rate`.
    temperature: likewise.
    vocabulary: of all tasks; bytes and 100 sentinels by default.
    data_dir: of TFDS.

  Returns:
    The mixture.

  Raises:
    DataError: tasks that cannot be had, unless they are skipped; none is left;
      see `beside_denoising` and `select`.
  """
  if missing not in ('error', 'skip'):
    raise errors.DataError(errors.near(missing, ['error', 'skip'], 'missing'))
  rows = select(families=families, count=count, seed=seed, exclude=exclude)
  yours = dict(tasks or {})
  for given in yours:
    if given not in exmix_table.TASKS:
      raise errors.DataError(
        errors.near(given, exmix_table.TASKS, 'task of ExMix')
      )
  names, absent = [], {}
  for row in rows:
    why = None if row.name in yours else why_not(row, data_dir)
    if why is not None:
      absent[row.name] = why
    elif row.name in yours:
      names.append(yours[row.name])
    else:
      spec = spec_of(row)
      names.append(
        t5_tasks.add(spec, vocabulary=vocabulary, data_dir=data_dir).name
      )
  _tell_absent(absent, len(rows), missing)
  return beside_denoising(
    name, names, denoising=denoising, ratio=ratio, cap=cap,
    temperature=temperature,
  )  # fmt: skip


def why_not(row: exmix_table.Row, data_dir: str | None = None) -> str | None:
  """Why a task cannot be had here, and what to do; None if it can."""
  yours = f'register a seqio task and give tasks={{{row.name!r}: NAME}}'
  if row.tfds is None:
    return f'TFDS has no such set: {yours}'
  if row.text is None:
    return f'how rows of {row.tfds} become text is not known here: {yours}'
  state = tfds_sets.state(spec_of(row).tfds, data_dir)
  if state == 'unknown':
    return f'this TFDS has no {row.tfds}: install another, or {yours}'
  if state == 'to build':
    return f'not on this machine: tfds build {row.tfds}'
  return None


def _tell_absent(absent, count, missing):
  if not absent:
    return
  lines = [f'{name}: {why}' for name, why in absent.items()]
  told = (
    f'Of {count} tasks of ExMix, {len(absent)} cannot be had here:\n'
    f'{errors.listed(lines, limit=len(lines))}'
  )
  if missing == 'skip' and len(absent) < count:
    logging.warning('%s\nThe mixture is made of the rest.', told)
    return
  rest = (
    'None is left.'
    if missing == 'skip'
    else "missing='skip' goes on without them."
  )
  raise errors.DataError(f'{told}\n{rest}')


def spec_of(row: exmix_table.Row) -> t5_tasks.TaskSpec:
  """A row of the table as a task over TFDS; `row.can_be_had` must hold."""
  kind, *columns = row.text
  if kind == 't5':
    return t5_tasks.TASKS[columns[0]]
  name, tfds = f'exmix_{row.name}', f'{row.tfds}:*.*.*'
  splits = _OTHER_SPLITS.get(row.name, _SPLITS)
  if kind == 'label':
    used, labels = columns[0].split(','), columns[1].split(',')
    return t5_tasks.classification(
      name, tfds, row.name, _NLI if labels == ['NLI'] else labels,
      columns=used, splits=splits,
    )  # fmt: skip
  metric = (_METRICS[row.metric],)
  if kind == 'summary':
    step = functools.partial(
      text.summarize, article=columns[0], summary=columns[1]
    )
    return t5_tasks.TaskSpec(name, tfds, [step], None, metric, splits)
  step = functools.partial(
    text.answer, name=row.name, inputs=columns[0], targets=columns[1]
  )
  post = postprocessors.answers if kind == 'answers' else None
  return t5_tasks.TaskSpec(name, tfds, [step], post, metric, splits)
