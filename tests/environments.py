# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The environment of a process that a test starts."""

import os
import re


def of(devices=1, **more):
  """This one, but for the number of devices and what else is given.

  One device where eight need not be: for eight it compiles three times as long.
  """
  flags = re.sub(
    '(device_count=)[0-9]+', rf'\g<1>{devices}', os.environ['XLA_FLAGS']
  )
  return {**os.environ, 'XLA_FLAGS': flags, **more}
