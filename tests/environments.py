# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a test runs in: flags of processes that it starts, and devices."""

import os
import re
from unittest import mock

import jax


def of(devices=1, **more):
  """This one, but for the number of devices and what else is given.

  One device where eight need not be: for eight it compiles three times as long.
  """
  flags = re.sub(
    '(device_count=)[0-9]+', rf'\g<1>{devices}', os.environ['XLA_FLAGS']
  )
  return {**os.environ, 'XLA_FLAGS': flags, **more}


def one_device():
  """A context in which meshes are of one device, as on a user's machine.

  A step of eight devices compiles three times as long: tests of meshes ask for
  them, tests of commands need not.
  """
  one = jax.devices()[:1]
  return mock.patch.object(jax, 'devices', lambda *_: one)
