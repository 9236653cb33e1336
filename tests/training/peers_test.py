# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Processes that die, fail, stop or end, as the others see them."""

import pathlib
import time
from unittest import mock

from absl.testing import absltest
import numpy as np

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

  def killed(self, index):
    """A process that counts no more, and says nothing of it."""
    watch = self.watch(index)
    while not watch._file(index).exists():
      time.sleep(0.01)
    watch._closing.set()

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
    self.killed(1)
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
    calling = self.watch(0)
    self.killed(1)
    calling.close(RuntimeError('Gloo all-reduce failed: closed by peer'))
    (message,) = self.said
    self.assertIn('Process 1 of 3 has given no sign', message)

  def test_a_stopped_run_is_no_failure(self):
    self.watch(0)
    self.watch(1).close(errors.Stopped('at step 3'))
    self.assertEmpty(self.heard(2 * PATIENCE))

  def test_who_is_held_up_itself_does_not_judge(self):
    # As two processes that compile side by side: the faster one is back first.
    self.killed(1)
    held_up = self.watch(0)
    held_up._closing.wait = lambda every: time.sleep(1.5 * PATIENCE)
    self.assertEmpty(self.heard(4 * PATIENCE))

  def test_a_full_disk_is_no_dead_process(self):
    self.killed(1)
    with mock.patch.object(
      peers.files, 'atomic_path', side_effect=errors.CheckpointError('full')
    ):
      self.watch(0)
      self.assertEmpty(self.heard(2 * PATIENCE))
    # Where it writes again, it judges again.
    self.assertLen(self.heard(10 * PATIENCE), 1)


class SharedFolderTest(absltest.TestCase):
  def test_a_folder_that_a_process_does_not_see_is_refused(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / 'out'
    run = mock.Mock(directory=folder)
    of_two = {
      'broadcast_one_to_all': lambda token: token,
      'sync_global_devices': lambda name: None,
    }
    self.enter_context(mock.patch.multiple(peers.multihost_utils, **of_two))
    self.enter_context(mock.patch.object(peers.jax, 'process_count', lambda: 2))
    gathered = self.enter_context(
      mock.patch.object(peers.multihost_utils, 'process_allgather')
    )
    gathered.side_effect = lambda seen: np.array([seen, False])
    with self.assertRaisesRegex(errors.ConfigError, 'process 1 does not see'):
      peers.watch_peers().on_start(run)
    gathered.side_effect = lambda seen: np.array([seen, seen])
    watch = peers.watch_peers()
    watch.on_start(run)
    watch.close()


if __name__ == '__main__':
  absltest.main()
