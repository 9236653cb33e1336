# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `adapter_transfer.py` trains on, and how the tasks are shared out.

Classification tasks with all answers as arrays, read through seqio once and kept
in a cache; and the mixture that models are pre-trained on. Needs the data folder
in MERGEJAX_DATA.
"""

import functools
import pathlib

import ext5_data
import numpy as np
import seqio

from mergejax.core import files as files_lib
from mergejax.data import answers
from mergejax.data import exmix
from mergejax.data import pretraining
from mergejax.data import rows
from mergejax.data import splits
from mergejax.data import tasks
from mergejax.training import choices

Batch = dict[str, np.ndarray]

_TEXT = '{text}'
# Trained on together. ATTEMPT's targets begin as the prompt of the first, the
# paper's is of natural language inference too.
MULTI = {
  'nli_sick': '{hypothesis} given: {premise}',
  'sentiment_tweets': _TEXT,
  'sentiment_books': _TEXT,
  'pros_cons': _TEXT,
  'tweet_hate': _TEXT,
  'tweet_offensive': _TEXT,
  'tweet_stance': 'of {target}: {text}',
  'sarcasm_debates': _TEXT,
  'clickbait': _TEXT,
  'sms_spam': _TEXT,
  'paper_field': _TEXT,
  'acceptability_cola': _TEXT,
}
# Of families that neither pre-training nor the tasks above have.
LEFT_OUT = {
  'topic_ag_news': _TEXT,
  'question_type_trec': _TEXT,
  'subjectivity': _TEXT,
  'emotion_selfreport': _TEXT,
}
# Rates were chosen on these, which nothing else sees.
DEVELOPMENT = {'sentiment_movie': _TEXT, 'emotion_tweets': _TEXT}
# Of the first, four whose experts are merged.
MERGED = ('tweet_offensive', 'clickbait', 'sms_spam', 'paper_field')

LENGTHS = {'inputs': 40, 'targets': 6}
# Every row has room for as many answers, so that programs serve all tasks.
CHOICES = 7
MOST = {'train': 1000, 'validation': 200, 'test': 500}
# Examples of denoising for one of the tasks in pre-training.
RATIO = 1.0
# What a program that knows nothing of choices reads.
PLAIN = (
  'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens',
  'decoder_loss_weights',
)  # fmt: skip
ANSWERS = (choices.TOKENS, choices.MASK, choices.LABELS)


def _files(name: str) -> dict[str, str]:
  return {s: f'tasks/{name}/{s}.tsv' for s in MOST}


def _labels(name: str) -> list[str]:
  """The labels of a table, in order; a split may lack one."""
  found = set()
  for file in _files(name).values():
    table = rows.Rows(tasks.locate(file))
    for number in range(len(table)):
      (label,) = table.fields(number, ['label'])
      found.add(label.decode())
  return sorted(found)


def _read(name: str, split: str, cache: pathlib.Path) -> Batch:
  """The rows of a split, or a fixed sample of them."""
  template = {**MULTI, **LEFT_OUT, **DEVELOPMENT}[name]
  task = answers.add_choice_task(
    f'transfer_{name}', _files(name), choices=_labels(name), label='{label}',
    inputs=f'{name.replace("_", " ")}: {template}',
    vocabulary=ext5_data.vocabulary(cache), by_content=True,
  )  # fmt: skip
  batches = splits.batches(
    task.name, lengths=LENGTHS, batch_size=256, split=split,
    kind='encoder_decoder', max_examples=MOST[split], choices=True,
  )  # fmt: skip
  wanted = (*PLAIN, *ANSWERS)
  found = {n: np.concatenate([b[n] for b in batches]) for n in wanted}
  more = CHOICES - found[choices.MASK].shape[1]
  for name in (choices.TOKENS, choices.MASK):
    room = [(0, 0), (0, more)] + [(0, 0)] * (found[name].ndim - 2)
    found[name] = np.pad(found[name], room)
  real = found[choices.MASK].any(axis=1)
  return {name: leaf[real] for name, leaf in found.items()}


def load(name: str, split: str, cache: pathlib.Path) -> Batch:
  """A split as arrays with all answers; read once, then kept.

  `encoder_input_tokens <int32>[rows, 40]`, `choice_tokens <int32>[rows, 7, 6]`,
  and what else a batch of `training.t_few` has.
  """
  path = cache / 'choices' / f'{name}_{split}.npz'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with files_lib.atomic_path(path) as temporary:
      with open(temporary, 'wb') as out:
        np.savez(out, **_read(name, split, cache))
  return dict(np.load(path))


def together(names, cache: pathlib.Path) -> Batch:
  """Training rows of several tasks, with the number of each as `task_ids`."""
  parts = []
  for number, name in enumerate(names):
    part = load(name, 'train', cache)
    ids = np.full(len(part[choices.LABELS]), number, np.int32)
    parts.append({**part, 'task_ids': ids})
  return {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}


def few(name: str, shots: int, seed: int, cache: pathlib.Path) -> Batch:
  """A few training rows of one task, drawn by the seed."""
  return numbered(some(load(name, 'train', cache), shots, seed))


def some(found: Batch, count: int, seed: int) -> Batch:
  """So many rows, drawn by the seed."""
  size = len(found[choices.LABELS])
  kept = np.random.default_rng(seed).permutation(size)[:count]
  return {n: leaf[kept] for n, leaf in found.items()}


def numbered(found: Batch) -> Batch:
  """Rows of one task alone, which is number 0."""
  ids = np.zeros(len(found[choices.LABELS]), np.int32)
  return {**found, 'task_ids': ids}


def in_batches(
  found: Batch, size: int, count: int | None = None
) -> list[Batch]:
  """Rows in batches of one size, the last filled up; so many batches, if told."""
  total = len(found[choices.LABELS])
  count = count or -(-total // size)
  missing = count * size - total
  filled = {
    n: np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
    for n, leaf in found.items()
  }
  return [
    {n: leaf[i * size : (i + 1) * size] for n, leaf in filled.items()}
    for i in range(count)
  ]


def commonest(name: str, cache: pathlib.Path) -> float:
  """Accuracy on the test rows of always the commonest answer in training."""
  before = load(name, 'train', cache)[choices.LABELS]
  best = np.bincount(before).argmax()
  return float((load(name, 'test', cache)[choices.LABELS] == best).mean())


@functools.cache
def mixture(cache: pathlib.Path) -> seqio.Mixture:
  """What models are pre-trained on: denoising, and the tasks of ExMix left.

  All of `ext5_data.MIXED` but the tasks that are trained on together, and none
  that is left out.
  """
  vocab = ext5_data.vocabulary(cache)
  seen = {**MULTI, **LEFT_OUT, **DEVELOPMENT}
  names = [
    ext5_data.table_task(name, templates, vocab)
    for members in ext5_data.MIXED.values()
    for name, templates in members.items()
    if name not in seen
  ]
  denoising = pretraining.corpora_mixture(
    corpora='corpora', directory=cache, vocabulary=vocab,
    cap=ext5_data.CAP_OF_DOMAINS,
  )  # fmt: skip
  return exmix.beside_denoising(
    'adapter_transfer', names, denoising=denoising, ratio=RATIO,
    cap=ext5_data.CAP,
  )  # fmt: skip
