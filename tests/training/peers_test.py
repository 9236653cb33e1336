# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes that die, fail, stop or end, as the others see them."""

import pathlib
import time

from absl.testing import absltest

from mergejax.core import errors
from mergejax.training import peers

PATIENCE = 0.4


class WatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path) / 'alive'
    self.said = []

  def watch(self, index, **settings):
    settings = dict(every=0.02, patience=PATIENCE) | settings
    leave = lambda message, after: self.said.append(message)
    watch = peers.Watch(self.folder, index, 3, leave=leave, **settings)
    self.addCleanup(watch.close)
    return watch

  def heard(self, within):
    """What was said, as soon as something was."""
    until = time.monotonic() + within
    while not self.said and time.monotonic() < until:
      time.sleep(0.01)
    return self.said

  def test_nobody_leaves_while_all_count(self):
    watches = [self.watch(i) for i in range(3)]
    self.assertEmpty(self.heard(2 * PATIENCE))
    # Those that end as they should are not missed.
    for watch in watches[:2]:
      watch.close()
    self.assertEmpty(self.heard(2 * PATIENCE))
    watches[2].close()
    self.assertFalse(self.folder.exists())

  def test_a_killed_process_is_named(self):
    self.watch(0)
    killed = self.watch(1)
    killed._closing.set()  # counts no more, and says nothing of it
    began = time.monotonic()
    (message,) = self.heard(10 * PATIENCE)
    self.assertGreater(time.monotonic() - began, PATIENCE / 2)
    self.assertRegex(message, 'Process 1 of 3 has given no sign for')
    self.assertIn('goes on from its last checkpoint', message)

  def test_a_process_that_has_not_begun_is_waited_for(self):
    self.watch(0)
    self.assertEmpty(self.heard(2 * PATIENCE))

  def test_a_failure_is_told_at_once(self):
    self.watch(0, patience=60.0)
    failing = self.watch(2, patience=60.0)
    failing.close(ValueError('The disk is full.\nAt 0x1'))
    (message,) = self.heard(5.0)
    self.assertRegex(
      message, r'^Process 2 of 3 failed \(ValueError: The disk is full\.\)\.'
    )

  def test_an_unanswered_call_is_not_the_fault_of_who_made_it(self):
    calling, killed = self.watch(0), self.watch(1)
    killed._closing.set()
    calling.close(RuntimeError('Gloo all-reduce failed: closed by peer'))
    (message,) = self.said
    self.assertIn('Process 1 of 3 has given no sign', message)

  def test_a_stopped_run_is_no_failure(self):
    self.watch(0)
    self.watch(1).close(errors.Stopped('at step 3'))
    self.assertEmpty(self.heard(2 * PATIENCE))


if __name__ == '__main__':
  absltest.main()
