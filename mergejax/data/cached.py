# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What seqio's cache holds of a task: which splits, of which vocabulary."""

import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import preprocessors

# Examples of a cache whose tokens are compared with their texts.
_LOOKED_AT = 4
_TOKENIZERS = (
  seqio.preprocessors.tokenize,
  seqio.preprocessors.tokenize_and_append_eos,
  preprocessors.tokenized,
)


def check(mixture_or_task: seqio.Mixture | seqio.Task, split: str) -> None:
  """Raises if a task, or any member of a mixture, cannot be read from a cache.

  Raises:
    DataError: a task that is in no cache folder, a split that its cache lacks,
      or see `check_tokens`.
  """
  for task in seqio.get_subtasks(mixture_or_task):
    if not task.cache_dir:
      raise errors.DataError(
        f'The task {task.name} is in no cache folder: `mergejax cache '
        f'{task.name} --out DIR` writes it, and cache_dir=DIR reads it.'
      )
    try:
      task.get_cached_stats(split)
    except (ValueError, OSError) as error:
      raise errors.DataError(
        f'The cache of {task.name} in {task.cache_dir} has no split {split!r}.'
      ) from error
    check_tokens(task, task.cache_dir, split)


def check_tokens(task: seqio.Task, folder: str, split: str) -> None:
  """Raises if a cache has tokens of another vocabulary than its task has.

  seqio's caches do not name their vocabulary. They keep texts beside tokens
  (`inputs_pretokenized`), so those of the first examples are tokenised again.
  A task that keeps no texts, or changes tokens before they are cached, is not
  checked.

  Args:
    task: with the vocabulary that is to be used.
    folder: of its cache.
    split: whose examples are looked at.

  Raises:
    DataError: says what a text is there, and by the task's vocabulary.
  """
  if not _ends_with_tokenizer(task):
    return
  prefix = seqio.get_cached_tfrecord_prefix(folder, split)
  files = tf.constant(sorted(tf.io.gfile.glob(f'{prefix}-*')), tf.string)
  for record in tf.data.TFRecordDataset(files).take(_LOOKED_AT):
    example = tf.train.Example.FromString(record.numpy()).features.feature
    for name, feature in task.output_features.items():
      texts = example[f'{name}_pretokenized'].bytes_list.value
      if len(texts) != 1:
        continue
      there = list(example[name].int64_list.value)
      expected = feature.vocabulary.encode_tf(texts[0]).numpy().tolist()
      # Either may have been cut, or ended by the end token.
      both = min(len(there), len(expected))
      if there[:both] != expected[:both]:
        text = texts[0].decode(errors='replace')[:20]
        raise errors.DataError(
          f'The cache of {task.name} in {folder} has tokens of another '
          f'vocabulary: {name} that begin with {text!r} are '
          f'{there[:5]}... there, and {expected[:5]}... by '
          f'{type(feature.vocabulary).__name__} of '
          f'{feature.vocabulary.vocab_size} ids. Use the vocabulary that it '
          'was cached with, or cache the task anew in another folder.'
        )


def _ends_with_tokenizer(task):
  """Whether the last step before the cache is one that makes the tokens."""
  last = None
  for step in task.preprocessors:
    if isinstance(step, seqio.CacheDatasetPlaceholder):
      return last in _TOKENIZERS
    last = getattr(step, 'func', step)
  return False
