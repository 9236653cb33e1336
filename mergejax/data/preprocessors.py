# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From lines of local files to token features.

Every step is a stateless function of its input, so that tf.data can save and
restore the position of a stream exactly.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import string

import seqio
import tensorflow as tf

Dataset = tf.data.Dataset


def parse_jsonl(fields: Sequence[str]) -> Callable[[Dataset], Dataset]:
  """Lines of JSON objects -> `{field: string}`."""

  def parse(line):
    row = json.loads(line)
    return [str(row[field]).encode() for field in fields]

  def apply(dataset: Dataset) -> Dataset:
    def one(line):
      values = tf.numpy_function(
        parse, [line], [tf.string] * len(fields), stateful=False
      )
      for value in values:
        value.set_shape([])
      return dict(zip(fields, values))

    return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)

  return apply


def parse_tsv(columns: Sequence[str]) -> Callable[[Dataset], Dataset]:
  """Lines of tab-separated fields -> `{column: string}`; no quoting."""

  def apply(dataset: Dataset) -> Dataset:
    def one(line):
      values = tf.strings.split(line, '\t')
      return {name: values[i] for i, name in enumerate(columns)}

    return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)

  return apply


def parse_text(dataset: Dataset) -> Dataset:
  """Plain lines -> `{'text': string}`."""
  return dataset.map(
    lambda line: {'text': line}, num_parallel_calls=tf.data.AUTOTUNE
  )


def columns_of(templates: Mapping[str, str]) -> list[str]:
  """Names in braces, over all templates: `'{a} and {b}'` -> `['a', 'b']`."""
  return sorted(
    {
      column
      for template in templates.values()
      for _, column, _, _ in string.Formatter().parse(template)
      if column is not None
    }
  )


def format_features(
  templates: Mapping[str, str],
) -> Callable[[Dataset], Dataset]:
  """Fills templates from columns: `{'inputs': 'cola: {sentence}'}`.

  T5's text-to-text form: a task's prefix is part of its template.
  """

  def fill(template, row):
    parts = []
    for literal, column, _, _ in string.Formatter().parse(template):
      parts.append(literal)
      if column is not None:
        parts.append(row[column])
    return tf.strings.join(parts)

  def apply(dataset: Dataset) -> Dataset:
    return dataset.map(
      lambda row: {
        feature: fill(template, row) for feature, template in templates.items()
      },
      num_parallel_calls=tf.data.AUTOTUNE,
    )

  return apply


def end_documents(
  dataset: Dataset, output_features: Mapping[str, seqio.Feature]
) -> Dataset:
  """Appends the end token to every document."""
  end = output_features['targets'].vocabulary.eos_id

  def one(row):
    return {'targets': tf.concat([row['targets'], [end]], 0)}

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def concatenate_and_split(
  dataset: Dataset,
  sequence_length: Mapping[str, int] | None,
  documents: int = 64,
) -> Dataset:
  """Joins documents end to end and cuts them into rows of the given length.

  Rows are full, so nothing needs packing; only the last of every `documents`
  documents may be shorter. No token is lost.

  Args:
    dataset: `{'targets': tokens}` per document, each with its end token.
    sequence_length: tokens of a row; None leaves the documents as they are.
    documents: how many are joined at a time.
  """
  if sequence_length is None:
    return dataset
  length = sequence_length['targets']

  def rows(joined):
    tokens = joined['targets'].flat_values
    whole = tf.size(tokens) // length * length
    full = tf.data.Dataset.from_tensor_slices(
      tf.reshape(tokens[:whole], [-1, length])
    )
    rest = tf.data.Dataset.from_tensors(tokens[whole:])
    # Rows are of any length from here on, as after tokenising.
    full = full.map(lambda row: tf.ensure_shape(row, [None]))
    return full.concatenate(rest.filter(lambda row: tf.size(row) > 0))

  return (
    dataset.ragged_batch(documents)
    .flat_map(rows)
    .map(lambda row: {'targets': row})
  )
