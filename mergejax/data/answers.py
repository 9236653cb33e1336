# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tasks whose rows have several answers, of which one is right.

Their batches are what `training.t_few` learns from and `rank_evaluator` ranks:
`choice_tokens <int32>[batch, choices, length]`, `choice_mask <bool>[batch,
choices]` and `labels <int32>[batch]`, beside those of any text-to-text task.
"""

from collections.abc import Mapping, Sequence
import functools
import os

import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import converters
from mergejax.data import features
from mergejax.data import preprocessors
from mergejax.data import tasks

FEATURE = 'choices'
TOKENS, MASK, LABELS = 'choice_tokens', 'choice_mask', 'labels'


def add_choice_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  inputs: str,
  choices: Mapping[str, str] | Sequence[str],
  label: str,
  vocabulary: seqio.Vocabulary | None = None,
  by_content: bool = False,
) -> seqio.Task:
  """Registers a task over TSV or JSONL files with answers to choose from.

  Its features are those of `tasks.add_table_task`, whose targets are the right
  answers, and all answers. One of several prompt templates for each example and
  visit, as T-Few draws them, is an equal mixture of a task for each template.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`.
    inputs: template of the input: `'{premise} Question: {hypothesis}?'`.
    choices: `{label: answer}`, templates both: `{'entailment': 'Yes', 'not
      entailment': 'No'}`, or of answers that differ by row `{'A': '{a}', 'B':
      '{b}'}`. A list where labels are answers. A row has no answer where the
      template gives nothing: an empty column.
    label: template of what is compared with the labels: `'{label}'`.
    vocabulary: bytes by default.
    by_content: append a digest of the content to the name, so that it cannot
      be that of another task.

  Returns:
    The task.

  Raises:
    UserError: fewer than two choices; see `tasks.add_table_task`. When it is
      read: a label that no answer has, or an answer that does not fit into the
      length of the targets.

  Source: Liu et al. (2022), https://arxiv.org/abs/2205.05638, section 3.2.
  """
  if not isinstance(choices, Mapping):
    choices = {each: each for each in choices}
  if len(choices) < 2:
    raise errors.DataError(
      f'The task {name!r} has {len(choices)} choices: at least two answers are '
      'needed for one to be chosen.'
    )
  vocabulary = vocabulary or features.vocabulary()
  given = {'inputs': inputs, 'label': label}
  given |= {f'answer {i}': each for i, each in enumerate(choices.values())}
  given |= {f'label {i}': each for i, each in enumerate(choices)}
  source = tasks.source_of(files, given, vocabulary, example_a_row=True)
  found = features.encoder_decoder(vocabulary)
  found[FEATURE] = seqio.Feature(vocabulary, add_eos=True, rank=2)
  return tasks.register(
    name, by_content, source,
    shuffle_buffer_size=None,  # the source shuffles whole files
    preprocessors=[
      functools.partial(
        _with_choices, inputs=inputs, choices=choices, label=label, task=name
      )
    ],
    output_features=found,
  )  # fmt: skip


def _with_choices(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int | Sequence[int]] | None = None,
  *,
  inputs: str,
  choices: Mapping[str, str],
  label: str,
  task: str,
) -> tf.data.Dataset:
  """Columns -> tokens of inputs, of the right answer, and of all answers."""
  vocabulary = output_features[FEATURE].vocabulary
  room = None if sequence_length is None else sequence_length['targets']

  @tf.autograph.experimental.do_not_convert  # there is nothing to convert
  def one(row):
    texts = [preprocessors.filled(each, row) for each in choices.values()]
    names = [preprocessors.filled(each, row) for each in choices]
    asked = preprocessors.filled(label, row)
    there = tf.stack([tf.strings.length(text) > 0 for text in texts])
    right = tf.logical_and(tf.stack(names) == asked, there)
    check = tf.debugging.Assert(
      tf.reduce_any(right),
      [f'DataError: {task}: no answer of a row has its label, which is', asked],
    )
    with tf.control_dependencies([check]):
      which = tf.argmax(right)
    tokens = [
      tf.concat([vocabulary.encode_tf(text), [vocabulary.eos_id]], 0)
      for text in texts
    ]
    # An answer that is not there has no token either.
    sizes = tf.where(there, tf.stack([tf.size(each) for each in tokens]), 0)
    longest = tf.reduce_max(sizes)
    if room is not None:
      check = tf.debugging.Assert(
        longest <= room,
        [
          f'DataError: {task}: an answer does not fit into {room} tokens, the '
          'length of the targets; with its end token it has', longest,
        ],
      )  # fmt: skip
      with tf.control_dependencies([check]):
        longest = tf.identity(longest)
    every = tf.stack([
      tf.pad(each[:size], [(0, longest - size)])
      for each, size in zip(tokens, tf.unstack(sizes))
    ])  # fmt: skip
    found = seqio.preprocessors.append_eos_after_trim_impl(
      seqio.preprocessors.tokenize_impl(
        {'inputs': preprocessors.filled(inputs, row)}, output_features
      ),
      output_features, sequence_length,
    )  # fmt: skip
    own = tf.gather(every, which)[: tf.gather(sizes, which)]
    return {**found, 'targets': own, FEATURE: every}

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def most(provider: seqio.Task | seqio.Mixture) -> int:
  """How many answers a row has at most, over the tasks of a mixture.

  Raises:
    DataError: a task that is none of `add_choice_task`.
  """
  counts = []
  for task in seqio.get_subtasks(provider):
    found = [
      len(step.keywords[FEATURE])
      for step in task.preprocessors
      if isinstance(step, functools.partial) and step.func is _with_choices
    ]
    if not found:
      raise errors.DataError(
        f'The rows of {task.name} have one answer, and no choices: register it '
        'with answers.add_choice_task, or leave choices=True out.'
      )
    counts += found
  return max(counts)


def kept(
  provider: seqio.Task | seqio.Mixture, lengths: Mapping[str, int]
) -> converters.Extra:
  """What batches of a task or mixture say of the answers; see the module.

  Args:
    provider: of tasks of `add_choice_task`.
    lengths: tokens per feature; those of targets are those of every answer.
  """
  count, length = most(provider), lengths['targets']
  spec = lambda rank, dtype=tf.int32: converters.Spec(dtype=dtype, rank=rank)

  def make(found):
    tokens = found[FEATURE]
    there = tf.reduce_any(tokens > 0, axis=-1)
    same = tf.reduce_all(tokens == found['targets'][None], axis=-1)
    label = tf.argmax(tf.logical_and(same, there), output_type=tf.int32)
    return {TOKENS: tokens, MASK: there, LABELS: label}

  return converters.Extra(
    FEATURE, spec(2), (count, length),
    {TOKENS: spec(2), MASK: spec(1, tf.bool), LABELS: spec(0)},
    {TOKENS: count, MASK: count, LABELS: 1}, make,
  )  # fmt: skip
