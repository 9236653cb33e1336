# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run saved on eight devices continues on several processes."""

import json
import pathlib
import socket
import subprocess
import sys

from absl.testing import absltest
import environments
import numpy as np
import pytest

_SCRIPT = pathlib.Path(__file__).with_name('processes.py')


def start(folder, steps, model, *distributed, devices):
  return subprocess.Popen(
    [sys.executable, _SCRIPT, *map(str, (folder, steps, model, *distributed))],
    env=environments.of(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def found(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  lines = [line for line in out.splitlines() if line.startswith('{')]
  return json.loads(lines[-1]) if lines else None


class ProcessesTest(absltest.TestCase):
  def test_eight_devices_then_two_processes(self):
    self.check(2)

  @pytest.mark.slow
  def test_eight_devices_then_four_processes(self):
    self.check(4)

  def check(self, processes):
    folder = pathlib.Path(self.create_tempdir().full_path)
    whole = start(folder / 'whole', 5, 2, devices=8)
    found(start(folder / 'run', 2, 2, devices=8))
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    # On another mesh too: four slices of data, none of the model.
    run = [
      start(folder / 'run', 5, 1, address, processes, i, devices=4 // processes)
      for i in range(processes)
    ]  # fmt: skip
    expected = found(whole)
    first, *_ = [found(process) for process in run]
    self.assertEqual(list(first['losses']), ['3', '4', '5'])
    for step, loss in first['losses'].items():
      np.testing.assert_allclose(loss, expected['losses'][step], rtol=1e-5)
    np.testing.assert_allclose(
      first['average'], expected['average'], rtol=1e-4, atol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
