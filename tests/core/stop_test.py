# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""SIGTERM ends work between two steps, and is never lost."""

import signal
import threading
from unittest import mock

from absl.testing import absltest
import jax
from jax.experimental import multihost_utils
import numpy as np

from mergejax.core import errors
from mergejax.core import stop as stop_lib


def terminate():
  signal.raise_signal(signal.SIGTERM)


class StopRequestTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: self.heard.append(1))
    self.addCleanup(signal.signal, signal.SIGTERM, before)

  def test_notes_and_ends_between_steps(self):
    done = []
    with self.assertRaisesRegex(errors.Stopped, 'after 2'):
      with stop_lib.StopRequest() as stop:
        for step in range(5):
          stop.check(f'after {step}')
          if step == 1:
            terminate()
          done.append(step)
    self.assertEqual(done, [0, 1])
    self.assertEmpty(self.heard)
    terminate()
    self.assertNotEmpty(self.heard)

  def test_what_nobody_acted_on_goes_on(self):
    with stop_lib.StopRequest() as stop:
      terminate()
      self.assertTrue(stop.received)
      self.assertEmpty(self.heard)
    self.assertLen(self.heard, 1)

  def test_to_the_request_around_it(self):
    with self.assertRaisesRegex(errors.Stopped, 'outside'):
      with stop_lib.StopRequest(at_once='outside'):
        with stop_lib.StopRequest() as inner:
          terminate()
        self.fail('The outer request did not hear of it.')
    self.assertTrue(inner.received)

  def test_at_once(self):
    reached = []
    with self.assertRaisesRegex(errors.Stopped, 'now'):
      with stop_lib.StopRequest(at_once='now'):
        reached.append('before')
        terminate()
        reached.append('after')
    self.assertEqual(reached, ['before'])
    self.assertEmpty(self.heard)

  def test_other_threads_hear_nothing(self):
    found = []

    def work():
      with stop_lib.StopRequest() as stop:
        found.append(signal.getsignal(signal.SIGTERM))
        found.append(stop.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    self.assertEqual(found, [signal.getsignal(signal.SIGTERM), False])

  def test_processes_agree_where_they_wait(self):
    stop = stop_lib.StopRequest()
    self.assertFalse(stop.agreed())
    gathered = lambda mine: np.array([mine, True])
    with (
      mock.patch.object(jax, 'process_count', lambda: 2),
      mock.patch.object(multihost_utils, 'process_allgather', gathered),
    ):
      self.assertFalse(stop.agreed(may_wait=False))
      self.assertTrue(stop.agreed(may_wait=True))
    stop.received = True
    self.assertTrue(stop.agreed(may_wait=False))


if __name__ == '__main__':
  absltest.main()
