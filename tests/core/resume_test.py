# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A journal holds what was done, however the process ended."""

import concurrent.futures
import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.core import errors
from mergejax.core import identity
from mergejax.core import resume

# Several settings, put in another order by another process.
WORK = {'seed': 0, 'options': {'density': 0.5, 'gamma': 0.1}}
SAME = {'options': {'gamma': 0.1, 'density': 0.5}, 'seed': 0}
OTHER = {'seed': 0, 'options': {'density': 0.5, 'gamma': 0.2}}


class LinesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'new' / 'log'
    self.journal = resume.Journal(self.path, 'search', WORK)

  def again(self, work=SAME, kind='search'):
    return resume.Journal(self.path, kind, work)

  def test_nothing_is_there_at_first(self):
    self.assertEqual(self.journal.rows(), [])
    self.assertIsNone(self.journal.stated())
    self.assertFalse(self.path.parent.exists())

  def test_rows_come_back_in_order(self):
    rows = [{'point': [0.1, -1e-300]}, 'a/b', 'two\nlines', None]
    for row in rows:
      self.journal.append(row)
    self.assertEqual(self.again().rows(), rows)
    self.assertEqual(self.again().stated(), identity.record(WORK))
    header = json.loads(self.path.read_text().splitlines()[0])
    self.assertEqual(header, {'search': identity.record(WORK)})

  def test_begun_is_the_same_without_a_row(self):
    self.journal.begin()
    self.journal.begin()
    self.assertEqual(self.again().stated(), identity.record(WORK))
    self.assertEqual(self.again().rows(), [])

  def test_every_cut_leaves_whole_lines(self):
    self.journal.append({'point': 'é' * 3})
    self.journal.append({'point': 2})
    data = self.path.read_bytes()
    for size in range(len(data)):
      self.path.write_bytes(data[:size])
      rows = self.again().rows()
      self.assertEqual(rows, [{'point': 'é' * 3}, {'point': 2}][: len(rows)])
      self.again().append({'point': 3})
      self.assertEqual(self.again().rows(), [*rows, {'point': 3}])

  def test_other_work_is_refused(self):
    self.journal.append(1)
    self.assertNotEqual(self.again().stated(), self.again(OTHER).record)
    with self.assertRaisesRegex(
      errors.ConfigError, 'options/gamma: 0.1 there, 0.2 asked for'
    ):
      self.again(OTHER).rows()
    with self.assertRaisesRegex(errors.ConfigError, 'other settings'):
      self.again(kind='merge').rows()
    with mock.patch.object(identity, 'code', lambda: {'mergejax': 'x'}):
      with self.assertRaisesRegex(errors.ConfigError, 'version of the code'):
        self.again().rows()

  def test_what_is_no_journal_is_refused(self):
    self.journal.begin()
    self.path.write_text('{"search": 1}\nnot json\n')
    self.assertEqual(self.again().stated(), {})
    with self.assertRaisesRegex(errors.DataError, 'cannot be read'):
      self.again().rows()

  def test_forgotten(self):
    self.journal.append(1)
    self.journal.forget()
    self.journal.forget()
    self.assertEqual(self.again().rows(), [])

  def test_many_threads_write_whole_lines(self):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(lambda n: self.journal.append('x' * n), range(200)))
    self.assertEqual(sorted(map(len, self.again().rows())), list(range(200)))

  def test_a_row_is_on_the_disk_when_that_is_asked_for(self):
    with mock.patch.object(os, 'fsync') as fsync:
      self.journal.append(1, sync=False)
      fsync.assert_not_called()
      self.journal.append(2)
      fsync.assert_called_once()

  def test_no_path_keeps_nothing(self):
    journal = resume.Journal(None, 'search', WORK)
    journal.begin()
    journal.append(1)
    journal.save({}, {})
    journal.forget()
    self.assertEqual(journal.rows(), [])
    self.assertIsNone(journal.load())
    self.assertIsNone(journal.stated())


class StateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'new' / 'state'
    self.journal = resume.Journal(self.path, 'statistics', WORK)

  def test_comes_back_with_the_same_bits(self):
    arrays = {
      'a/b|c': np.random.default_rng(0).normal(size=(3, 2)),
      'file': np.arange(3, dtype=np.int32),
      'about': np.float32(np.nan),
    }
    self.assertIsNone(self.journal.load())
    self.journal.save({'old': np.ones(2)}, {'batches': 1})
    self.journal.save(arrays, {'batches': 2, 'aliases': {'a': 'b'}})
    again = resume.Journal(self.path, 'statistics', SAME)
    found, about = again.load()
    self.assertEqual(about, {'batches': 2, 'aliases': {'a': 'b'}})
    self.assertEqual(sorted(found), sorted(arrays))
    for name, array in arrays.items():
      self.assertEqual(found[name].dtype, array.dtype)
      self.assertEqual(found[name].tobytes(), array.tobytes())
    self.assertEqual([p.name for p in self.path.parent.iterdir()], ['state'])

  def test_a_save_that_fails_leaves_the_one_before(self):
    self.journal.save({'x': np.ones(2)}, {})
    with mock.patch.object(np, 'savez', side_effect=KeyboardInterrupt):
      with self.assertRaises(KeyboardInterrupt):
        self.journal.save({'x': np.zeros(2)}, {})
    np.testing.assert_array_equal(self.journal.load()[0]['x'], 1)

  def test_other_work_is_refused(self):
    self.journal.save({}, {})
    with self.assertRaisesRegex(errors.ConfigError, 'gamma: 0.1 there, 0.2'):
      resume.Journal(self.path, 'statistics', OTHER).load()

  @parameterized.parameters(b'', b'{}', b'PK')
  def test_what_is_no_state_is_refused(self, data):
    self.journal.save({}, {})
    self.path.write_bytes(data)
    with self.assertRaisesRegex(errors.DataError, 'remove it'):
      self.journal.load()

  def test_a_state_that_was_cut_short_is_refused(self):
    self.journal.save({'x': np.ones(64)}, {'batches': 1})
    whole = self.path.read_bytes()
    for size in range(1, len(whole), 97):
      self.path.write_bytes(whole[:size])
      with self.assertRaisesRegex(errors.DataError, 'remove it'):
        self.journal.load()
    flipped = bytearray(whole)
    flipped[whole.index(np.ones(64).tobytes()) + 5] ^= 1
    self.path.write_bytes(flipped)
    with self.assertRaisesRegex(errors.DataError, 'remove it'):
      self.journal.load()


if __name__ == '__main__':
  absltest.main()
