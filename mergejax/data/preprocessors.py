# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From columns of local files to token features.

Every step is a stateless function of its input, so that tf.data can save and
restore the position of a stream exactly.
"""

from collections.abc import Callable, Mapping
import string

import seqio
import tensorflow as tf

from mergejax.core import errors

Dataset = tf.data.Dataset


def columns_of(templates: Mapping[str, str]) -> list[str]:
  """Names in braces, over all templates: `'{a} and {b}'` -> `['a', 'b']`.

  Raises:
    UserError: unbalanced braces, braces with more than a name, or no name.
  """
  found = set()
  for feature, template in templates.items():
    try:
      parts = list(string.Formatter().parse(template))
    except (ValueError, TypeError) as error:
      raise errors.DataError(
        f'The template of {feature}, {template!r}, cannot be read: {error}. A '
        "column's name stands in braces; {{ and }} are braces themselves."
      ) from error
    for _, column, spec, conversion in parts:
      if spec or conversion or column == '':
        raise errors.DataError(
          f'The template of {feature}, {template!r}, has braces without a '
          'plain column name: nothing is formatted or converted.'
        )
      if column is not None:
        found.add(column)
  if not found:
    raise errors.DataError(
      f'No template names a column in braces: {dict(templates)}.'
    )
  return sorted(found)


def format_features(
  templates: Mapping[str, str],
) -> Callable[[Dataset], Dataset]:
  """Fills templates from columns: `{'inputs': 'cola: {sentence}'}`.

  T5's text-to-text form: a task's prefix is part of its template.
  """

  def apply(dataset: Dataset) -> Dataset:
    return dataset.map(
      lambda row: {
        feature: filled(template, row)
        for feature, template in templates.items()
      },
      num_parallel_calls=tf.data.AUTOTUNE,
    )

  return apply


def filled(template: str, row: Mapping[str, tf.Tensor]) -> tf.Tensor:
  """A template with the columns of a row in it, as text."""
  parts = []
  for literal, column, _, _ in string.Formatter().parse(template):
    parts.append(literal)
    if column is not None:
      parts.append(row[column])
  return tf.strings.join(parts)


def tokenized(
  dataset: Dataset, output_features: Mapping[str, seqio.Feature]
) -> Dataset:
  """seqio's `tokenize`, which reads a few rows ahead instead of 256.

  These would be part of every saved position, of every task of a mixture.

  Args:
    dataset: `{feature: string}`.
    output_features: of the task.

  Returns:
    `{feature: <int32>[tokens]}`, and the text as `'{feature}_pretokenized'`.
  """

  @tf.autograph.experimental.do_not_convert  # there is nothing to convert
  def one(texts):
    return seqio.preprocessors.tokenize_impl(texts, output_features)

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def filled_and_tokenized(
  dataset: Dataset,
  output_features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int] | None = None,
  *,
  templates: Mapping[str, str],
) -> Dataset:
  """Columns -> tokens with the end token: three steps in one.

  Examples are those of `format_features`, `tokenized` and seqio's
  `append_eos_after_trim`. Every step of every task is traced and runs threads
  of its own: a mixture of many tasks opens sooner with fewer.

  Args:
    dataset: `{column: string}`.
    output_features: of the task.
    sequence_length: tokens of each feature, the end token included; None cuts
      nothing.
    templates: of the features, see `format_features`.

  Returns:
    As `tokenized`.
  """

  @tf.autograph.experimental.do_not_convert  # there is nothing to convert
  def one(row):
    texts = {name: filled(each, row) for name, each in templates.items()}
    return seqio.preprocessors.append_eos_after_trim_impl(
      seqio.preprocessors.tokenize_impl(texts, output_features),
      output_features,
      sequence_length,
    )

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def tokenize_documents(
  dataset: Dataset, output_features: Mapping[str, seqio.Feature]
) -> Dataset:
  """Documents -> tokens with the end token last, and the bytes of each token.

  A token's bytes are those from the end of the token before it to its own end,
  in the text as it was before the vocabulary normalised it. What follows the
  last one (white space that was dropped) is the end token's. So the numbers
  of a document sum to its UTF-8 bytes, and those of the rows that it is cut
  into do, wherever the cuts are.

  Args:
    dataset: `{'targets': string}`.
    output_features: of the task.

  Returns:
    `{'targets': <int32>[tokens], 'num_bytes': <int32>[tokens]}`; without
    `num_bytes` for a vocabulary that does not tell where its tokens end.
  """
  vocabulary = output_features['targets'].vocabulary

  def one(row):
    tokens, ends = _tokens_and_ends(vocabulary, row['targets'])
    result = {'targets': tf.concat([tokens, [vocabulary.eos_id]], 0)}
    if ends is not None:
      whole = tf.strings.length(row['targets'])
      cuts = tf.concat([[0], ends, [whole]], 0)
      result['num_bytes'] = cuts[1:] - cuts[:-1]
    return result

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE)


def _tokens_and_ends(vocabulary, text):
  """Tokens, and the byte of the text after each; None if it is not known."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    tokens = vocabulary.encode_tf(text)
    return tokens, tf.range(1, tf.size(tokens) + 1)
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    tokenizer = vocabulary.tf_tokenizer
    if hasattr(tokenizer, 'tokenize_with_offsets'):
      tokens, _, ends = tokenizer.tokenize_with_offsets(text)
      return tokens, tf.cast(ends, tf.int32)
  return vocabulary.encode_tf(text), None


def concatenate_and_split(
  dataset: Dataset,
  sequence_length: Mapping[str, int] | None,
  documents: int = 64,
) -> Dataset:
  """Joins documents end to end and cuts them into rows of the given length.

  Rows are full, so nothing needs packing; only the last of every `documents`
  documents may be shorter. No token is lost.

  Args:
    dataset: `{'targets': tokens}` per document, each with its end token, and
      other features with a number for every token.
    sequence_length: tokens of a row; None leaves the documents as they are.
    documents: how many are joined at a time.
  """
  if sequence_length is None:
    return dataset
  length = sequence_length['targets']

  def rows(joined):
    flat = {name: leaf.flat_values for name, leaf in joined.items()}
    whole = tf.size(flat['targets']) // length * length
    full = tf.data.Dataset.from_tensor_slices(
      {n: tf.reshape(leaf[:whole], [-1, length]) for n, leaf in flat.items()}
    )
    rest = tf.data.Dataset.from_tensors(
      {name: leaf[whole:] for name, leaf in flat.items()}
    )
    # Rows are of any length from here on, as after tokenising.
    full = full.map(
      lambda row: {n: tf.ensure_shape(leaf, [None]) for n, leaf in row.items()}
    )
    return full.concatenate(
      rest.filter(lambda row: tf.size(row['targets']) > 0)
    )

  return dataset.ragged_batch(documents).flat_map(rows)
