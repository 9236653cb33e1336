# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is replaced survives whatever happens to what replaces it."""

import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from mergejax.core import errors
from mergejax.core import files


def make(path, kind, text):
  if kind == 'file':
    path.write_text(text)
  else:
    path.mkdir()
    (path / 'inner').mkdir()
    (path / 'inner' / 'weights').write_text(text)


def read(path):
  return (path if path.is_file() else path / 'inner' / 'weights').read_text()


class Signal(BaseException):
  """As a handler raises at any instruction."""


KINDS = [(a, b) for a in ('file', 'folder') for b in ('file', 'folder')]


class AtomicPathTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.folder / 'model'

  def assert_old_is_whole(self):
    self.assertEqual(read(self.path), 'old')
    self.assertEqual([p.name for p in self.folder.iterdir()], ['model'])

  @parameterized.product(kinds=KINDS, swaps=(True, False))
  def test_replaces(self, kinds, swaps):
    make(self.path, kinds[0], 'old')
    swap = files._renameat2 if swaps else lambda a, b: False
    with mock.patch.object(files, '_renameat2', swap):
      with files.atomic_path(self.path, overwrite=True) as temporary:
        make(temporary, kinds[1], 'new')
        self.assertEqual(read(self.path), 'old')
    self.assertEqual(read(self.path), 'new')
    self.assertEqual([p.name for p in self.folder.iterdir()], ['model'])

  @parameterized.product(kinds=KINDS, calls=(1, 2, 3), after=(True, False))
  def test_the_old_one_survives_a_signal(self, kinds, calls, after):
    """At each of the renames, where two paths cannot be swapped in one step."""
    make(self.path, kinds[0], 'old')
    left = [calls]

    def hit(real):
      def call(*paths):
        left[0] -= 1
        if left[0] == 0 and not after:
          raise Signal
        real(*paths)
        if left[0] == 0:
          raise Signal

      return call

    with (
      mock.patch.multiple(os, rename=hit(os.rename), replace=hit(os.replace)),
      mock.patch.object(files, '_renameat2', lambda a, b: False),
    ):
      try:
        with files.atomic_path(self.path, overwrite=True) as temporary:
          make(temporary, kinds[1], 'new')
      except Signal:
        pass
    # The old one until the new one has its name; never neither.
    self.assertIn(read(self.path), ('old', 'new'))
    if left[0] <= 0 and calls == 1 and 'folder' in kinds:
      self.assertEqual(read(self.path), 'old')
    self.assertEqual([p.name for p in self.folder.iterdir()], ['model'])

  @parameterized.parameters(*KINDS)
  def test_the_old_one_survives_a_failure(self, old, new):
    make(self.path, old, 'old')
    with self.assertRaises(Signal):
      with files.atomic_path(self.path, overwrite=True) as temporary:
        make(temporary, new, 'new')
        raise Signal
    self.assert_old_is_whole()

  def test_a_failure_without_words_is_told_by_its_kind(self):
    with self.assertRaisesRegex(
      errors.CheckpointError, 'Could not write .*model: OSError'
    ):
      with files.atomic_path(self.path):
        raise OSError

  @parameterized.parameters('file', 'folder')
  def test_a_power_cut_leaves_no_empty_result(self, kind):
    """All of it is on the disk before it has its name, and its name after."""
    events = []
    real = os.fsync

    def fsync(descriptor):
      events.append(os.readlink(f'/proc/self/fd/{descriptor}'))
      real(descriptor)

    def rename(source, target):
      events.append('renamed')
      os.replace(source, target)

    with mock.patch.multiple(os, fsync=fsync, rename=rename):
      with files.atomic_path(self.path) as temporary:
        make(temporary, kind, 'new')
        inside = [str(p) for p in temporary.rglob('*')] + [str(temporary)]
    at = events.index('renamed')
    self.assertCountEqual(events[:at], inside)
    self.assertEqual(events[at + 1 :], [str(self.folder)])


if __name__ == '__main__':
  absltest.main()
