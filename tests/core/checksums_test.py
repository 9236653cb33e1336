# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sums of files are right, also when they are remembered."""

import hashlib
import os
import pathlib
from unittest import mock

from absl.testing import absltest

from mergejax.core import checksums


class ChecksumsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.file = self.folder / 'weights'
    self.file.write_bytes(b'some numbers')
    environment = mock.patch.dict(
      os.environ, {'XDG_CACHE_HOME': str(self.folder / 'cache')}
    )
    environment.start()
    self.addCleanup(environment.stop)

  def expected(self):
    return hashlib.sha256(self.file.read_bytes()).hexdigest()

  def test_sums_and_remembers(self):
    self.assertEqual(checksums.Sums().of(self.file), self.expected())
    digest = self.expected()
    self.assertIn(digest, checksums.memory_file().read_text())
    with mock.patch.object(checksums.hashlib, 'sha256', side_effect=OSError):
      self.assertEqual(checksums.Sums().of(self.file), digest)

  def test_a_changed_file_is_summed_again(self):
    checksums.Sums().of(self.file)
    before = self.file.stat()
    # The same size, and a modification time that is set back.
    self.file.write_bytes(b'some NUMBERS')
    os.utime(self.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    self.assertEqual(checksums.Sums().of(self.file), self.expected())

  def test_damaged_or_unwritable_memory_is_no_obstacle(self):
    memory = checksums.memory_file()
    memory.parent.mkdir(parents=True)
    for damage in ('{', '[]', '{"x": 3}'):
      memory.write_text(damage)
      self.assertEqual(checksums.Sums().of(self.file), self.expected())
    with mock.patch.object(checksums.os, 'replace', side_effect=OSError):
      self.file.write_bytes(b'other')
      self.assertEqual(checksums.Sums().of(self.file), self.expected())

  def test_a_missing_file(self):
    with self.assertRaises(OSError):
      checksums.Sums().of(self.folder / 'nowhere')


if __name__ == '__main__':
  absltest.main()
