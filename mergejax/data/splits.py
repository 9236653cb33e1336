# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A split once: batches to evaluate on, and what is cut of its examples."""

from collections.abc import Mapping
import logging
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import answers as answers_lib
from mergejax.data import converters
from mergejax.data import objectives
from mergejax.data import samples
from mergejax.data import sources
from mergejax.data import stream

# To see how long an example is, it is given so many times the room it has.
_ROOM = 16
# Examples of a table that training looks at for that.
_LOOKED_AT = 1024


class _CountingConverter(seqio.LMFeatureConverter):
  """Keeps the bytes behind each token beside the tokens."""

  def __init__(self):
    spec = seqio.FeatureConverter.FeatureSpec(dtype=tf.int32)
    super().__init__(pack=False, passthrough_features={'num_bytes': spec})

  def _convert_example(self, features):
    converted = super()._convert_example(features)
    return {**converted, 'num_bytes': features['num_bytes']}

  def get_model_feature_lengths(self, task_feature_lengths):
    lengths = super().get_model_feature_lengths(task_feature_lengths)
    return {**lengths, 'num_bytes': task_feature_lengths['num_bytes']}


def _converter(kind, dataset):
  if kind == 'lm' and 'num_bytes' in dataset.element_spec:
    return _CountingConverter()
  return stream.CONVERTERS[kind](pack=False)


def batches(
  mixture_or_task: str,
  *,
  lengths: Mapping[str, int],
  batch_size: int,
  split: str,
  kind: str = 'lm',
  max_examples: int | None = None,
  answers: bool = False,
  choices: bool = False,
) -> list[stream.Batch]:
  """A split, or a fixed random sample of it, in batches of equal shape.

  Args:
    mixture_or_task: a name registered in seqio.
    lengths: tokens per feature.
    batch_size: rows of a batch; the last is filled with empty rows of weight 0.
    split: the split to read.
    kind: as in `stream.SeqioStream`; never packed.
    max_examples: at most this many examples, see `samples`. A source that is no
      local file is read to its end for it.
    answers: the targets are answers, of which nothing may be cut off. Other
      targets, and inputs, that are cut are told in a warning.
    choices: with all answers of tasks of `answers.add_choice_task`; empty rows
      have none.

  Returns:
    Batches of `<int32>[batch_size, length]` arrays. Those of a text task have
    `num_bytes <int32>[batch_size]` too: UTF-8 bytes of the text behind a row.

  Raises:
    UserError: an unknown name, a split that is not there or has no example, a
      bad row, an answer that does not fit.
  """
  provider = stream.find(mixture_or_task, split)
  stream.check_lengths(lengths, kind)
  stream.check_positive('batch size', batch_size)
  if max_examples is not None:
    stream.check_positive('number of examples', max_examples)
    provider = samples.narrowed(provider, split, max_examples)
  if kind in ('encoder_decoder', 'prefix_lm') and not _cut_by_itself(provider):
    _check_cuts(provider, split, lengths, max_examples, answers)
  dataset = in_order(provider, split, lengths)
  converter = _converter(kind, dataset)
  if choices:
    extra = answers_lib.kept(provider, lengths)
    converter = converters.extended(stream.CONVERTERS[kind], False, [extra])
    lengths = {**lengths, extra.feature: extra.length}
  rows = list(_read(converter, dataset, lengths, max_examples))
  if not rows:
    raise errors.DataError(
      f'The split {split!r} of {mixture_or_task} has no example.'
    )
  return _in_batches(rows, batch_size)


def _cut_by_itself(provider):
  return any(
    objectives.makes_rows(task) for task in seqio.get_subtasks(provider)
  )


def in_order(
  provider: seqio.Task | seqio.Mixture,
  split: str,
  lengths: Mapping[str, int] | None,
) -> Any:
  """The examples of a split, once, in its own order: a `tf.data.Dataset`.

  Args:
    provider: a task or mixture.
    split: the split.
    lengths: tokens that features are cut to; None: as they are.
  """
  with stream.reporting_bad_tasks(provider.name):
    return provider.get_dataset(
      None if lengths is None else dict(lengths),
      split=split, shuffle=False, num_epochs=1, seed=0,
    )  # fmt: skip


def longest(mixture_or_task: str, split: str) -> dict[str, int]:
  """Tokens of the longest inputs and targets; all of a split is read for it.

  Args:
    mixture_or_task: a name registered in seqio.
    split: the split.

  Returns:
    `{feature: tokens}`, the longest over all tasks of a mixture.

  Raises:
    UserError: an unknown name, a split that is not there or has no example.
  """
  found: dict[str, int] = {}
  for task in seqio.get_subtasks(stream.find(mixture_or_task, split)):
    names = [n for n in ('inputs', 'targets') if n in task.output_features]
    with stream.reporting_bad_rows():
      sizes = in_order(task, split, None).map(
        lambda row, names=names: {name: tf.size(row[name]) for name in names}
      )
      for row in sizes.as_numpy_iterator():
        for name, size in row.items():
          found[name] = max(found.get(name, 1), int(size))
  if not found:
    raise errors.DataError(
      f'The split {split!r} of {mixture_or_task} has no example.'
    )
  return found


def _read(converter, dataset, lengths, most):
  """Rows of a converted dataset; the bytes of a row are summed."""
  lengths = dict(lengths)
  if isinstance(converter, _CountingConverter):
    lengths['num_bytes'] = lengths['targets']
  with stream.reporting_bad_rows():
    for row in samples.drawn(
      converter(dataset, task_feature_lengths=lengths), most
    ):
      if 'num_bytes' in row:
        row['num_bytes'] = row['num_bytes'].sum(dtype=np.int32)
      yield row


def _in_batches(rows, size):
  found = []
  for start in range(0, len(rows), size):
    part = rows[start : start + size]
    batch = {name: np.stack([row[name] for row in part]) for name in part[0]}
    missing = size - len(part)
    found.append(
      {
        name: np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        for name, leaf in batch.items()
      }
    )
  return found


def _check_cuts(provider, split, lengths, most, answers):
  """Compares the tokens of every example with the room that they have."""
  roomy = {name: _ROOM * length for name, length in lengths.items()}
  sizes = {name: [] for name in lengths}
  with stream.reporting_bad_rows():
    dataset = in_order(provider, split, roomy).map(
      lambda row: {name: tf.size(row[name]) for name in lengths}
    )
    for row in samples.drawn(dataset, most):
      for name, size in row.items():
        sizes[name].append(int(size))
  for name, found in sizes.items():
    long = [size for size in found if size > lengths[name]]
    if not long:
      continue
    longest = f'{max(long)} tokens' + (
      ' or more' if max(long) == roomy[name] else ''
    )
    what = (
      f'{len(long)} of {len(found)} {name} of {provider.name}, {split}, are '
      f'longer than {lengths[name]} tokens, the end token included'
    )
    if name == 'targets' and answers:
      raise errors.DataError(
        f'{what}. Answers that are cut off can no longer be told apart: the '
        f'length of {name} must be at least {longest}.'
      )
    logging.warning('%s, and are cut. The longest has %s.', what, longest)


def tell_cuts(
  mixture_or_task: str, split: str, lengths: Mapping[str, int]
) -> None:
  """Warns of inputs and targets of tables that are cut to their lengths.

  Args:
    mixture_or_task: a name registered in seqio.
    split: of which a sample of each table is looked at.
    lengths: tokens per feature.
  """
  for task in seqio.get_subtasks(seqio.get_mixture_or_task(mixture_or_task)):
    source = task.source
    if isinstance(source, sources.RowSource) and source.example_a_row:
      sample = samples.narrowed(task, split, _LOOKED_AT)
      _check_cuts(sample, split, lengths, None, answers=False)
