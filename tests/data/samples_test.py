# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Samples and shuffled streams of files that are sorted by label."""

import json
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import seqio
import tensorflow as tf

from mergejax.data import features
from mergejax.data import samples
from mergejax.data import sources
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import tasks

ROWS = 5000  # more than any buffer
LENGTHS = {'inputs': 8, 'targets': 4}
OPTIONS = dict(lengths=LENGTHS, kind='encoder_decoder', batch_size=50)


def numbers_of(batches):
  """Row numbers, which are the inputs of the tables here."""
  rows = [r for b in batches for r in b['encoder_input_tokens'] if r.any()]
  return [int(bytes(int(t) - 3 for t in r if t > 2)) for r in rows]


def smallest(count, most):
  """The rows with the smallest of random numbers, drawn one by one."""
  rng = np.random.default_rng(0)
  draws = [(rng.random(), number) for number in range(count)]
  return sorted(number for _, number in sorted(draws)[:most])


class SortedFileTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def table(self, count=ROWS):
    path = self.folder / f'{count}.tsv'
    rows = [f'{i}\t{"neg" if i < count // 2 else "pos"}' for i in range(count)]
    path.write_text('\n'.join(['n\tl', *rows]) + '\n')
    return tasks.add_table_task(
      'sorted', {'test': path, 'train': path}, inputs='{n}', targets='{l}',
      by_content=True,
    ).name  # fmt: skip

  def foreign(self, count=3000):
    """A task whose source is not a file and does not know its size."""
    name = f'foreign_{count}'
    if name not in seqio.TaskRegistry.names():
      vocabulary = features.vocabulary()

      def read(split, shuffle_files, seed=None):
        del split, shuffle_files, seed
        text = tf.strings.as_string
        return tf.data.Dataset.range(count).map(
          lambda i: {'inputs': text(i), 'targets': text(i // (count // 2))}
        )

      seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(read, splits=['test']),
        preprocessors=[
          seqio.preprocessors.tokenize,
          seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features.encoder_decoder(vocabulary),
      )
    return name

  def test_numbers_are_those_with_the_smallest_draws(self):
    self.assertEqual(samples.numbers(40, 7).tolist(), smallest(40, 7))
    self.assertEqual(samples.numbers(5, 9).tolist(), list(range(5)))

  def test_a_large_file_has_the_same_sample_and_order(self):
    found = []
    for size in (sources.HELD_BYTES, -1):
      with mock.patch.object(sources, 'HELD_BYTES', size):
        name = self.table(60)
        batches = splits.batches(name, split='test', max_examples=9, **OPTIONS)
        opened = stream.SeqioStream(name, pack=False, **OPTIONS)
        found.append((numbers_of(batches), numbers_of([next(opened)])))
    self.assertEqual(*found)
    self.assertEqual(found[0][0], smallest(60, 9))

  @parameterized.parameters('table', 'foreign')
  def test_a_sample_is_of_the_whole_split(self, kind):
    name = getattr(self, kind)()
    count = {'table': ROWS, 'foreign': 3000}[kind]
    found = numbers_of(
      splits.batches(name, split='test', max_examples=120, **OPTIONS)
    )
    self.assertEqual(found, smallest(count, 120))
    # Of a constant answer: the share of a fair coin, within 4 deviations.
    share = np.mean(np.array(found) < count // 2)
    self.assertBetween(share, 0.5 - 4 * 0.046, 0.5 + 4 * 0.046)

  def test_a_sample_of_text_is_of_all_documents(self):
    path = self.folder / 'text.jsonl'
    path.write_text(
      ''.join(json.dumps({'text': f'{i:05}' * 4}) + '\n' for i in range(3000))
    )
    task = tasks.add_text_task('text', {'test': path}, by_content=True)
    batches = splits.batches(
      task.name, split='test', lengths={'targets': 21}, batch_size=64,
      max_examples=128,
    )  # fmt: skip
    rows = [r for b in batches for r in b['decoder_target_tokens'] if r.any()]
    documents = [int(bytes(int(t) - 3 for t in r[:5])) for r in rows]
    self.assertEqual(documents, smallest(3000, 128))
    self.assertEqual(sum(b['num_bytes'].sum() for b in batches), 20 * 128)

  def test_a_large_corpus_is_sampled_by_documents(self):
    path = self.folder / 'text.txt'
    path.write_text(''.join(f'document {i:04}\n' for i in range(1000)))
    task = tasks.add_text_task('large', {'test': path}, by_content=True)
    with mock.patch.object(samples, 'DOCUMENT_BYTES', 14 * 100):
      narrow = samples.narrowed(task, 'test', 10)
    found = [
      int(row['text'].decode().split()[1])
      for row in narrow.source.get_dataset('test', False).as_numpy_iterator()
    ]
    self.assertLen(set(found), 100)
    self.assertEqual(found, sorted(found))
    self.assertBetween(np.mean(found), 350, 650)

  def test_training_batches_have_both_classes(self):
    opened = stream.SeqioStream(self.table(), pack=False, seed=1, **OPTIONS)
    epochs = [
      numbers_of([next(opened) for _ in range(ROWS // 50)]) for _ in range(2)
    ]
    for found in epochs:
      self.assertEqual(sorted(found), list(range(ROWS)))
      shares = np.mean(np.reshape(found, [-1, 50]) < ROWS // 2, axis=1)
      self.assertBetween(shares.min(), 0.5 - 5 * 0.071, 0.5)
      self.assertBetween(shares.max(), 0.5, 0.5 + 5 * 0.071)
    self.assertLess(np.mean(np.equal(*epochs)), 0.01)

  @parameterized.parameters(
    (3, False), (8, False), (9, False), (13, False), (13, True)
  )
  def test_a_shuffled_stream_continues_exactly(self, taken, large):
    # 40 rows in batches of 5: before, at and after the end of an epoch.
    if large:
      held = mock.patch.object(sources, 'HELD_BYTES', -1)
      self.enterContext(held)
    name = self.table(40)
    options = OPTIONS | dict(batch_size=5, pack=False)
    first = stream.SeqioStream(name, **options)
    for _ in range(taken):
      next(first)
    state = first.state()
    expected = numbers_of([next(first) for _ in range(12)])
    again = stream.SeqioStream(name, **options)
    again.restore(state)
    self.assertEqual(numbers_of([next(again) for _ in range(12)]), expected)
    self.assertNotEqual(expected, sorted(expected))

  def test_a_program_ends_while_rows_are_read_ahead(self):
    path = self.folder / 't.tsv'
    path.write_text('n\tl\n' + 'x\ty\n' * 20_000)
    code = f"""
import time
from mergejax.data import rows, sources, stream, tasks
sources.HELD_BYTES = -1
fields = rows.Rows.fields
rows.Rows.fields = lambda *row: time.sleep(0.01) or fields(*row)
tasks.add_table_task('t', {{'train': {str(path)!r}}}, inputs='{{n}}', targets='{{l}}')
opened = stream.SeqioStream('t', lengths={LENGTHS}, batch_size=50, kind='encoder_decoder', pack=False)
next(opened)
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=300)

  def test_shards_part_every_epoch(self):
    name = self.table(40)
    options = OPTIONS | dict(batch_size=5, pack=False)
    shards = [
      stream.SeqioStream(name, shard_index=i, num_shards=2, **options)
      for i in range(2)
    ]
    for _ in range(2):
      parts = [numbers_of([next(s) for _ in range(4)]) for s in shards]
      self.assertEqual(sorted(parts[0] + parts[1]), list(range(40)))


if __name__ == '__main__':
  absltest.main()
