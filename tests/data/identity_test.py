# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A position belongs to the data it was saved in, whoever reads them."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import stream
from mergejax.data import tasks
from mergejax.training import arrays
from mergejax.training import streams


class PositionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.task('numbers', self.write('a.tsv', range(48)))

  def write(self, name, numbers):
    rows = ''.join(f'{i}\t{i % 2}\n' for i in numbers)
    (self.folder / name).parent.mkdir(exist_ok=True)
    (self.folder / name).write_text('number\tparity\n' + rows)
    return self.folder / name

  def task(self, name, file, inputs='{number}', vocabulary=None):
    tasks.add_table_task(
        name, {'train': file}, inputs=inputs, targets='{parity}',
        vocabulary=vocabulary,
    )  # fmt: skip

  def open(self, name='numbers', **changes):
    settings = dict(
        lengths={'inputs': 8, 'targets': 4}, batch_size=4, pack=False,
        kind='encoder_decoder', seed=1,
    )  # fmt: skip
    return stream.SeqioStream(name, **settings | changes)

  def saved(self, **changes):
    opened = self.open(**changes)
    next(opened)
    return opened.state()

  def test_the_same_data_elsewhere_go_on(self):
    first = self.open()
    next(first)
    self.task('renamed', self.write('other/a.tsv', range(48)))
    second = self.open('renamed')
    second.restore(first.state())
    np.testing.assert_array_equal(
      next(second)['encoder_input_tokens'], next(first)['encoder_input_tokens']
    )

  def test_other_batches_are_refused(self):
    state = self.saved()
    for changes, message in (
      (dict(batch_size=8), 'batch_size: 4 there, 8 asked for'),
      (dict(seed=2), 'seed: 1 there, 2 asked for'),
      (dict(pack=True), 'pack: False there, True asked for'),
      (
        dict(lengths={'inputs': 16, 'targets': 4}),
        'lengths/inputs: 8 there, 16 asked for',
      ),
      (dict(shard_index=1, num_shards=2), 'shard: 0 of 1 there, 1 of 2 asked'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        self.open(**changes).restore(state)

  def test_other_data_are_refused(self):
    state = self.saved()
    # As many rows, and the first of them the same.
    file = self.write('a.tsv', [*range(47), 99])
    self.task('changed', file)
    with self.assertRaisesRegex(
      errors.UserError, r'data/files: a.tsv \w+ there'
    ):
      self.open('changed').restore(state)
    self.write('a.tsv', range(48))
    self.task('asked_otherwise', file, inputs='a {number}')
    with self.assertRaisesRegex(errors.UserError, 'data/made by'):
      self.open('asked_otherwise').restore(state)
    self.task('numbers', file)
    mixtures.add_mixture('numbers_alone', {'numbers': 1.0})
    again = self.open('numbers_alone')
    with self.assertRaisesRegex(errors.UserError, 'data/part 0: None there'):
      again.restore(state)
    mixture = again.state()
    mixtures.add_mixture('weighed', {'numbers': 2.0})
    with self.assertRaisesRegex(
      errors.UserError, 'data/part 0/rate: 1.0 there'
    ):
      self.open('weighed').restore(mixture)

  @parameterized.parameters(b'7', b'', b'PK no archive')
  def test_what_is_no_position(self, state):
    with self.assertRaisesRegex(errors.UserError, 'older version'):
      self.open().restore(state)

  def test_its_name_tells_of_the_vocabulary(self):
    self.assertIn('numbers', str(self.open()))
    self.assertIn(
      f'ByteVocabulary of {features.vocabulary().vocab_size}', str(self.open())
    )


class ProcessesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.create_tempdir().full_path)
    rows = ''.join(f'{i}\t{i % 2}\n' for i in range(48))
    (folder / 'a.tsv').write_text('number\tparity\n' + rows)
    tasks.add_table_task(
        'shared', {'train': folder / 'a.tsv'}, inputs='{number}',
        targets='{parity}',
    )  # fmt: skip

  def parts(self, numbers, shards):
    return streams.PartsStream(
      {
        i: stream.SeqioStream(
            'shared', lengths={'inputs': 8, 'targets': 4}, pack=False,
            batch_size=8 // shards, kind='encoder_decoder', seed=1,
            shard_index=i, num_shards=shards,
        )
        for i in numbers
      }
    )  # fmt: skip

  def test_two_processes_go_on_as_one_and_one_as_two(self):
    pair = [self.parts([i], 2) for i in range(2)]
    rows = lambda some: np.concatenate(
      [next(one)['encoder_input_tokens'] for one in some]
    )
    rows(pair)
    states = [one.state() for one in pair]
    one = self.parts([0, 1], 2)
    streams.restore(one, states)
    expected = [rows(pair) for _ in range(3)]
    np.testing.assert_array_equal(rows([one]), expected[0])
    # And back: each of two takes its share of what one process saved.
    pair = [self.parts([i], 2) for i in range(2)]
    for process in pair:
      streams.restore(process, [one.state()])
    np.testing.assert_array_equal(rows(pair), expected[1])
    np.testing.assert_array_equal(rows([one]), expected[1])

  def test_a_stream_that_all_read_is_taken_over_by_any_number(self):
    whole = self.parts([0], 1)
    next(whole)
    again = self.parts([0], 1)
    streams.restore(again, [whole.state()] * 3)
    np.testing.assert_array_equal(
      next(again)['encoder_input_tokens'], next(whole)['encoder_input_tokens']
    )

  def test_what_nobody_saved_is_missed(self):
    whole = self.parts([0], 1)
    with self.assertRaisesRegex(errors.UserError, r'parts \[1\] .* \[.0.\]'):
      streams.restore(self.parts([0, 1], 2), [whole.state()])
    alone = arrays.ArrayStream({'x': np.arange(4)}, 2)
    with self.assertRaisesRegex(errors.UserError, 'saved by 2 .* start 2'):
      streams.restore(alone, [alone.state()] * 2)


class ArraysTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(batch_size=4), 'batch_size: 2 there, 4 asked for'),
    (dict(seed=9), 'seed: 0 there, 9 asked for'),
    (dict(arrays={'x': np.arange(8) + 1}), 'arrays: '),
    (dict(arrays={'x': np.arange(8.0)}), 'arrays: '),
  )
  def test_other_arrays_or_batches_are_refused(self, changes, message):
    settings = dict(arrays={'x': np.arange(8)}, batch_size=2)
    first = arrays.ArrayStream(**settings)
    next(first)
    again = arrays.ArrayStream(**settings)
    again.restore(first.state())
    np.testing.assert_array_equal(next(again)['x'], next(first)['x'])
    with self.assertRaisesRegex(errors.UserError, message):
      arrays.ArrayStream(**settings | changes).restore(first.state())
    with self.assertRaisesRegex(errors.UserError, 'arrays: None there'):
      again.restore(b'3')


if __name__ == '__main__':
  absltest.main()
