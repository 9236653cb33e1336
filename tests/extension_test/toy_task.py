# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A task of a stranger: say whether a number is even, with a metric of its own."""

import seqio
import tensorflow as tf

_FEATURES = {
  name: seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  for name in ('inputs', 'targets')
}


def _numbers(split, shuffle_files=False, seed=None):
  del shuffle_files, seed
  first = {'train': 0, 'validation': 100, 'test': 200}[split]
  numbers = tf.data.Dataset.range(first, first + 32)
  return numbers.map(
    lambda n: {
      'inputs': tf.strings.as_string(n),
      'targets': tf.where(n % 2 == 0, 'even', 'odd'),
    }
  )


def _share_even(targets, predictions):
  del targets
  return {
    'share_even': sum(p == 'even' for p in predictions) / len(predictions)
  }


seqio.TaskRegistry.add(
  'toy_even',
  source=seqio.FunctionDataSource(
    _numbers, splits=('train', 'validation', 'test')
  ),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features=_FEATURES,
  metric_fns=[_share_even],
)
