# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of users' own files: their headers, and what is wrong with a line."""

import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import corpora
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import rows
from mergejax.data import sources
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import tasks

LENGTHS = {'inputs': 48, 'targets': 16}
MNLI_TRAIN = (
  'index promptID pairID genre sentence1_binary_parse sentence2_binary_parse '
  'sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label'
).split()
MNLI_DEV = [*MNLI_TRAIN[:11], 'label2 label3 label4 label5 gold_label']
MNLI_DEV = ' '.join(MNLI_DEV).split()
MNLI_TEST = MNLI_TRAIN[:10]


def text_of(tokens):
  return bytes(int(t) - 3 for t in tokens if t > 2).decode()


def examples(task, split):
  """`[(input, target)]` of a table task, as its batches say them."""
  batches = splits.batches(
      task.name, lengths=LENGTHS, batch_size=4, split=split,
      kind='encoder_decoder',
  )  # fmt: skip
  return [
    (text_of(i), text_of(t))
    for b in batches
    for i, t in zip(b['encoder_input_tokens'], b['decoder_target_tokens'])
    if t.any()
  ]


class RowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def write(self, name, text):
    path = self.folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

  def table(self, *, inputs='{s}', targets='{l}', **files):
    return tasks.add_table_task(
      'rows', files, inputs=inputs, targets=targets, by_content=True
    )

  def test_every_file_has_its_own_header(self):
    task = self.table(
      train=self.write('train.tsv', 's\tl\na\tyes\n'),
      validation=self.write('dev.tsv', 'id\tl\ts\textra\n7\tno\tb\tz\n'),
    )
    self.assertEqual(examples(task, 'train'), [('a', 'yes')])
    self.assertEqual(examples(task, 'validation'), [('b', 'no')])

  def test_mnli_has_other_columns_in_each_split(self):
    def split(name, header):
      short = lambda c: c.removeprefix('gold_')
      values = {c: f'{short(c)} of {name}' for c in header}
      line = '\t'.join(values[c] for c in header)
      return self.write(f'{name}.tsv', '\t'.join(header) + f'\n{line}\n')

    task = self.table(
      inputs='{sentence1} | {sentence2}',
      targets='{gold_label}',
      train=split('train', MNLI_TRAIN),
      validation=split('dev', MNLI_DEV),
      test=split('test', MNLI_TEST),
    )
    for name, part in (('train', 'train'), ('dev', 'validation')):
      expected = (
        f'sentence1 of {name} | sentence2 of {name}', f'label of {name}'
      )  # fmt: skip
      self.assertEqual(examples(task, part), [expected])
    with self.assertRaisesRegex(
      errors.UserError, r"'gold_label'.*test\.tsv.*|test\.tsv.*'gold_label'"
    ):
      examples(task, 'test')

  def test_the_test_file_of_sst2_has_no_label(self):
    task = self.table(
      inputs='{sentence}',
      targets='{label}',
      train=self.write('train.tsv', 'sentence\tlabel\nfine film \t1\n'),
      test=self.write('test.tsv', 'index\tsentence\n0\tuneasy mishmash\n'),
    )
    self.assertEqual(examples(task, 'train'), [('fine film ', '1')])
    with self.assertRaisesRegex(
      errors.UserError, r"column of .*test\.tsv, 'label'.*index, sentence"
    ):
      examples(task, 'test')

  @parameterized.parameters(
    ('t.tsv', 's\tl\nx\tyes\n\n', r't\.tsv, line 3: .*2 fields.* blank line'),
    ('t.tsv', 's\tl\nx\tyes\ny\n', r't\.tsv, line 3: .*2 fields.*found 1'),
    ('t.tsv', 's\tl\nx\tyes\tmore\n', r't\.tsv, line 2: .*2 fields.*found 3'),
    ('t.tsv', b's\tl\nx\t\xff\n', r't\.tsv, line 2: .*not UTF-8'),
    ('t.tsv', b's\t\xff\nx\ty\n', r't\.tsv, line 1: .*not UTF-8'),
    ('t.tsv', '', r't\.tsv is empty'),
    ('t.tsv', 's\tl\ts\nx\ty\tz\n', r't\.tsv, line 1 .*twice'),
    ('t.tsv', 's\tl\n', 'has no example'),
    ('t.jsonl', '{"s":"x","l":"y"}\n\n', r't\.jsonl, line 2: .*a blank line'),
    ('t.jsonl', '{"s":"x"}\n', r"t\.jsonl, line 1: .*the field 'l'"),
    ('t.jsonl', '{"s":"x","l":null}\n', r"line 1: 'l' should be text.*null"),
    ('t.jsonl', '{"s":["x"],"l":"y"}\n', r"line 1: 's' should be text"),
    ('t.jsonl', '["s", "l"]\n', r'line 1: expected a JSON object'),
    ('t.jsonl', '{"s":"\\ud800","l":"y"}\n', r"line 1: 's' is not Unicode"),
    ('t.jsonl', b'{"s":"\xff","l":"y"}\n', r'line 1: .*not UTF-8'),
  )
  def test_a_bad_line_is_told(self, name, text, message):
    path = self.write(name, text)
    with self.assertRaisesRegex(errors.UserError, message):
      examples(self.table(train=path), 'train')
    with mock.patch.object(sources, 'HELD_BYTES', -1):
      # As of a large file, whose rows are read when their turn comes.
      with self.assertRaisesRegex(errors.UserError, message) as caught:
        examples(self.table(train=path), 'train')
    self.assertNotIn('Traceback', caught.exception.message)

  @parameterized.parameters((0, 1), (3, 4))
  def test_too_few_rows_for_the_processes(self, count, shards):
    few = self.write('few.tsv', 's\tl\n' + 'x\ty\n' * count)
    many = self.write('many.tsv', 's\tl\n' + 'a\tb\n' * 40)
    names = [self.table(train=path).name for path in (few, many)]
    mixed = mixtures.add_mixture('m', names, rates='equal', by_content=True)
    settings = dict(
      lengths=LENGTHS, batch_size=4, kind='encoder_decoder', num_shards=shards
    )
    for name in (names[0], mixed.name):
      with self.assertRaisesRegex(errors.UserError, rf'has {count} rows.*too'):
        stream.SeqioStream(name, **settings)
    self.assertIn(
      'decoder_target_tokens', next(stream.SeqioStream(names[1], **settings))
    )

  def test_a_source_without_an_example(self):
    """Of a source that is no file it is known when it is read."""
    source = seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: (
        tf.data.Dataset.from_tensor_slices(
          {'inputs': np.array([], str), 'targets': np.array([], str)}
        )
      ),
      splits=['train'],
    )
    seqio.TaskRegistry.add(
      'nothing', source=source, metric_fns=[],
      preprocessors=[seqio.preprocessors.tokenize],
      output_features=features.encoder_decoder(features.vocabulary()),
    )  # fmt: skip
    self.addCleanup(seqio.TaskRegistry.remove, 'nothing')
    opened = stream.SeqioStream(
      'nothing', lengths=LENGTHS, batch_size=4, kind='encoder_decoder'
    )
    with self.assertRaisesRegex(errors.UserError, 'nothing has no example'):
      next(opened)

  def test_a_bad_line_is_told_in_training(self):
    path = self.write('t.tsv', 's\tl\n' + 'x\ty\n' * 40 + 'z\n')
    settings = dict(lengths=LENGTHS, batch_size=8, kind='encoder_decoder')
    with self.assertRaisesRegex(errors.UserError, 'line 42: .*found 1'):
      stream.SeqioStream(self.table(train=path).name, **settings)
    with mock.patch.object(sources, 'HELD_BYTES', -1):
      opened = stream.SeqioStream(self.table(train=path).name, **settings)
      with self.assertRaisesRegex(errors.UserError, '^[^\n]*line 42[^\n]*$'):
        for _ in range(20):
          next(opened)

  @parameterized.parameters(
    ('t.tsv', '\ufeffs\tl\nx\tyes\n'),
    ('t.tsv', 's\tl\r\nx\tyes\r\n'),
    ('t.tsv', 's\tl\nx\tyes'),
    ('t.jsonl', '\ufeff{"s":"x","l":"yes"}\n'),
    ('t.jsonl', '{"s":"x","l":"yes"}\r\n'),
    ('t.jsonl', '{"l":"yes","s":"x"}'),
  )
  def test_marks_and_line_ends_are_no_part_of_a_row(self, name, text):
    task = self.table(train=self.write(name, text))
    self.assertEqual(examples(task, 'train'), [('x', 'yes')])
    self.assertEqual(tasks.num_examples(task.name), 1)

  def test_numbers_of_json_are_text(self):
    text = '{"s": 1, "l": true}\n{"s": 1.5, "l": "é"}\n'
    task = self.table(train=self.write('t.jsonl', text))
    self.assertEqual(examples(task, 'train'), [('1', 'True'), ('1.5', 'é')])

  def test_a_column_of_blank_fields_is_a_column(self):
    task = self.table(targets='say', train=self.write('t.tsv', 's\na\n\n'))
    self.assertEqual(examples(task, 'train'), [('a', 'say'), ('', 'say')])

  def test_a_file_that_changes_is_told(self):
    path = self.write('t.tsv', 's\tl\nx\tyes\n')
    task = self.table(train=path)
    opened = rows.Rows(path)
    path.write_text('l\ts\nx\tyes and no\n')
    with self.assertRaisesRegex(errors.UserError, 'changed after its task'):
      examples(task, 'train')
    with self.assertRaisesRegex(errors.UserError, 'changed while it was read'):
      opened.fields(0, ['s'])

  def test_templates_are_checked(self):
    path = self.write('t.tsv', 's\tl\nx\tyes\n')
    for template, message in (
      ('{s', 'cannot be read'),
      ('{s!r}', 'plain column name'),
      ('{s:>3}', 'plain column name'),
      ('{}', 'plain column name'),
      ('no braces', 'No template names a column'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        self.table(inputs=template, targets='yes', train=path)

  def test_corpora_have_the_same_rows(self):
    self.write('a.jsonl', '\ufeff' + json.dumps({'text': 'some text'}) + '\n')
    self.write('b.txt', '\ufeffmore text\r\nof two lines\n')
    found = {d: list(t) for d, t in corpora.read_folder(self.folder).items()}
    self.assertEqual(found['a'], [('all', 'some text')])
    self.assertEqual(found['b'], [('all', 'more text\r\nof two lines\n')])
    self.write('a.jsonl', '{"text": "x"}\n\n')
    with self.assertRaisesRegex(errors.UserError, r'a\.jsonl, line 2: .*blank'):
      list(corpora.read_folder(self.folder)['a'])

  def test_a_split_that_is_not_there_is_told(self):
    path = self.write('t.tsv', 's\tl\nx\tyes\n')
    trained = self.table(train=path)
    tested = self.table(test=path)
    mixtures.add_mixture(
      'splits', [trained.name, tested.name], rates='equal', by_content=True
    )
    name = mixtures.add_mixture(
      'splits', [trained.name, tested.name], rates='equal', by_content=True
    ).name
    settings = dict(lengths=LENGTHS, batch_size=1, kind='encoder_decoder')
    message = f"{tested.name} has no split 'train'. It has test"
    with self.assertRaisesRegex(errors.UserError, message):
      stream.SeqioStream(name, **settings)
    with self.assertRaisesRegex(errors.UserError, message):
      mixtures.add_mixture('sizes', [trained.name, tested.name])
    with self.assertRaisesRegex(errors.UserError, "no split 'validation'"):
      splits.batches(name, split='validation', **settings)
    with self.assertRaisesRegex(errors.UserError, 'Did you mean'):
      splits.batches(name[:-1], split='test', **settings)

  def test_lengths_and_sizes_are_checked(self):
    task = self.table(train=self.write('t.tsv', 's\tl\nx\tyes\n'))
    settings = dict(
        lengths=LENGTHS, batch_size=1, kind='encoder_decoder', split='train',
    )  # fmt: skip
    for changed, message in (
      ({'lengths': {'inputs': 8}}, 'inputs and targets'),
      ({'lengths': {'inputs': 8, 'targets': 0}}, 'length of targets'),
      ({'batch_size': 0}, 'batch size'),
      ({'max_examples': -1}, 'number of examples'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        splits.batches(task.name, **settings | changed)

  def test_a_name_is_of_one_content(self):
    one = self.write('one.tsv', 's\tl\nx\tyes\n')
    other = self.write('other.tsv', 's\tl\nx\tno\n')
    add = lambda path, **more: tasks.add_table_task(
      'taken', {'train': path}, **dict(inputs='{s}', targets='{l}') | more
    )
    add(one)
    copy = self.write('copy.tsv', one.read_text())
    self.assertEqual(examples(add(copy), 'train'), [('x', 'yes')])
    for path, more in ((other, {}), (one, {'inputs': 'is {s}'})):
      with self.assertRaisesRegex(errors.UserError, "a task 'taken' of other"):
        add(path, **more)
    with self.assertRaisesRegex(errors.UserError, "a task 'taken' of other"):
      tasks.add_text_task('taken', {'train': self.write('t.txt', 'x\n')})
    with self.assertRaisesRegex(errors.UserError, 'name of a task'):
      tasks.add_text_task('a-b', {'train': self.folder / 't.txt'})
    mixtures.add_mixture('taken_mixture', {'taken': 1.0})
    mixtures.add_mixture('taken_mixture', {'taken': 1.0})
    with self.assertRaisesRegex(errors.UserError, "mixture 'taken_mixture'"):
      mixtures.add_mixture('taken_mixture', {'taken': 2.0})

  def test_one_file_for_several_splits_is_told(self):
    path = self.write('t.tsv', 's\tl\nx\tyes\n')
    other = self.write('u.tsv', 's\tl\nx\tno\n')
    with self.assertLogs(level='WARNING') as logs:
      self.table(train=path, validation=other, test=path)
    self.assertLen(logs.output, 1)
    self.assertIn('train and test hold the same rows', logs.output[0])
    with self.assertNoLogs(level='WARNING'):
      self.table(train=path, validation=other)


if __name__ == '__main__':
  absltest.main()
