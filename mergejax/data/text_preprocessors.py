# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled sets as text to text, in T5's words.

Each takes rows as TFDS has them and gives `inputs` and `targets` as strings,
with whatever else the metric of the task needs. All are stateless functions of
a row.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683, appendix D.
"""

from collections.abc import Mapping, Sequence

import seqio
import tensorflow as tf

Dataset = tf.data.Dataset
Row = Mapping[str, tf.Tensor]

LANGUAGES = {
  'cs': 'Czech', 'de': 'German', 'en': 'English', 'fi': 'Finnish',
  'fr': 'French', 'ro': 'Romanian', 'ru': 'Russian', 'zh': 'Chinese',
}  # fmt: skip
# For a row of a test set, which has no label.
UNLABELLED = '<unk>'


def translate(dataset: Dataset, source: str, target: str) -> Dataset:
  """`translate English to German: TEXT` -> TEXT.

  Args:
    dataset: rows with a text for each language.
    source: code of the language of the inputs, `'en'`.
    target: likewise of the targets.
  """
  prefix = f'translate {LANGUAGES[source]} to {LANGUAGES[target]}: '

  @seqio.map_over_dataset
  def one(row):
    return {'inputs': prefix + row[source], 'targets': row[target]}

  return one(dataset)


def summarize(dataset: Dataset, article: str, summary: str) -> Dataset:
  """`summarize: ARTICLE` -> SUMMARY, from these columns."""

  @seqio.map_over_dataset
  def one(row):
    return {'inputs': 'summarize: ' + row[article], 'targets': row[summary]}

  return one(dataset)


def classify(
  dataset: Dataset,
  name: str,
  labels: Sequence[str],
  columns: Sequence[str] | None = None,
) -> Dataset:
  """`NAME column: TEXT column: TEXT` -> the label's name, as for GLUE.

  Args:
    dataset: rows with a whole number `label`; -1 is unlabelled.
    name: of the task, which begins the inputs.
    labels: names of the labels, in order.
    columns: which, in this order; by default all but label and idx, by name.
  """

  @seqio.map_over_dataset
  def one(row):
    parts = [tf.constant(name)]
    for column in columns or sorted(set(row) - {'label', 'idx'}):
      parts += [f'{column}:', row[column]]
    inputs = tf.strings.join(parts, separator=' ')
    if name == 'multirc':
      inputs = tf.strings.regex_replace(inputs, '<br>', ' ')
      inputs = tf.strings.regex_replace(inputs, '</?b>', '')
    return {
      'inputs': inputs,
      'targets': _label(labels, row['label']),
      **_numbers(row),
    }

  return one(dataset)


def _label(labels, number):
  known = tf.gather([UNLABELLED, *labels], tf.maximum(number, -1) + 1)
  return tf.ensure_shape(known, [])


def _numbers(row):
  """`idx` of a row, flat: `{'paragraph': 3}` is `idx/paragraph`."""
  index = row.get('idx')
  if isinstance(index, Mapping):
    return {f'idx/{part}': number for part, number in index.items()}
  return {} if index is None else {'idx': index}


def similarity(dataset: Dataset, name: str = 'stsb') -> Dataset:
  """STS-B: two sentences -> their likeness, 0.0 to 5.0 in steps of 0.2.

  Rounded half to even in fifths: 2.5 is "2.4".
  """

  @seqio.map_over_dataset
  def one(row):
    fifths = tf.round(tf.cast(row['label'], tf.float32) * 5)
    inputs = tf.strings.join(
      [name, 'sentence1:', row['sentence1'], 'sentence2:', row['sentence2']],
      separator=' ',
    )
    targets = tf.strings.as_string(fifths / 5, precision=1)
    return {'inputs': inputs, 'targets': targets, **_numbers(row)}

  return one(dataset)


def renamed(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
  """Keeps and renames columns: `{new name: name}`."""

  @seqio.map_over_dataset
  def one(row):
    return {new: row[old] for new, old in columns.items()}

  return one(dataset)


def _spaced(text):
  """Spaces around whatever is no letter, digit, accent, space or `_`."""
  text = tf.strings.regex_replace(text, r'([^_\s\p{N}\p{L}\p{M}])', r' \1 ')
  return _one_space(text)


def _one_space(text):
  return tf.strings.regex_replace(text, r'\s+', ' ')


def squad(dataset: Dataset) -> Dataset:
  """`question: ... context: ...` -> the first answer; all are kept.

  Punctuation stands between spaces, in answers too, so that they are found in
  the context token by token.
  """

  @seqio.map_over_dataset
  def one(row):
    answers = _spaced(row['answers']['text'])
    question, context = _spaced(row['question']), _spaced(row['context'])
    inputs = tf.strings.join(
      ['question:', question, 'context:', context], separator=' '
    )
    first = tf.concat([answers, ['']], 0)[0]  # a test set has none
    return {
      'inputs': _one_space(inputs), 'targets': first, 'id': row['id'],
      'context': context, 'question': question, 'answers': answers,
    }  # fmt: skip

  return one(dataset)


def record(dataset: Dataset) -> Dataset:
  """ReCoRD: a passage with a gap, and its entities -> the one that fits.

  A row for each of several right answers, and one `<unk>` where none is known.
  """

  @seqio.map_over_dataset
  def rows(row):
    passage = tf.strings.regex_replace(
      row['passage'], r'(\.|\?|\!|\"|\')\n@highlight\n', r'\1 '
    )
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.strings.reduce_join(row['entities'], separator=', ')
    inputs = tf.strings.join(
      ['record query:', row['query'], 'entities:', entities,
       'passage:', passage],
      separator=' ',
    )  # fmt: skip
    answers = row['answers']
    none = tf.fill([tf.cast(tf.equal(tf.size(answers), 0), tf.int32)], '<unk>')
    targets = tf.concat([answers, none], 0)
    count = tf.size(targets)
    repeat = lambda x: tf.repeat(tf.expand_dims(x, 0), count, 0)
    return {
      'inputs': repeat(inputs), 'targets': targets, 'answers': repeat(answers),
      **{name: repeat(number) for name, number in _numbers(row).items()},
    }  # fmt: skip

  return rows(dataset).unbatch()


def referent(dataset: Dataset, *, true_only: bool = False) -> Dataset:
  """WSC: `wsc: TEXT` with the pronoun between `*` -> what it refers to.

  Args:
    dataset: rows of `super_glue/wsc.fixed`.
    true_only: leave out rows whose candidate is not the referent, as training
      does: the text says nothing of them.
  """

  @seqio.map_over_dataset
  def one(row):
    words = tf.strings.split(row['text'], ' ')
    place = row['span2_index']
    marked = tf.concat(
      [words[:place], ['*' + row['span2_text'] + '*'], words[place + 1 :]], 0
    )
    return {
      'inputs': 'wsc: ' + tf.strings.reduce_join(marked, separator=' '),
      'targets': row['span1_text'],
      'label': row['label'],
      **_numbers(row),
    }

  if true_only:
    dataset = dataset.filter(lambda row: tf.equal(row['label'], 1))
  return one(dataset)


def definite_pronoun(dataset: Dataset) -> Dataset:
  """Definite pronoun resolution, as further rows of WSC.

  Of several places with the pronoun, the first is marked.
  """

  @seqio.map_over_dataset
  def one(row):
    pattern = tf.strings.join([r' (', row['pronoun'], r')( |\.|,)'])
    text = tf.strings.regex_replace(
      row['sentence'], pattern, r' *\1*\2', replace_global=False
    )
    targets = row['candidates'][tf.cast(row['label'], tf.int32)]
    return {'inputs': 'wsc: ' + text, 'targets': targets}

  return one(dataset)


def answer(dataset: Dataset, name: str, inputs: str, targets: str) -> Dataset:
  """`NAME: INPUTS` -> TARGETS, or the first of them; all are kept as answers.

  Args:
    dataset: rows.
    name: of the task, which begins the inputs.
    inputs: column with a text.
    targets: column with a text or a list of texts.
  """

  @seqio.map_over_dataset
  def one(row):
    answers = tf.reshape(row[targets], [-1])
    return {
      'inputs': name + ': ' + row[inputs],
      'targets': tf.concat([answers, ['']], 0)[0],
      'answers': answers,
    }

  return one(dataset)
