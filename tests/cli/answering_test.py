# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Two processes answer and score a task as one with the same devices does."""

import json
import pathlib
import signal
import socket
import subprocess
import sys

from absl.testing import absltest
import answering
import environments
import small_talkers

import mergejax as mj
from mergejax import models

FILE = f'{answering.TASK}-predict_with_aux.jsonl-00000-of-00001'


def start(devices, *arguments):
  return subprocess.Popen(
    [sys.executable, answering.__file__, *map(str, arguments)],
    env=environments.of(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


class AnsweringTest(absltest.TestCase):
  def test_two_processes_as_one(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    module, params = small_talkers.build('t5x')
    mj.save_checkpoint(folder / 'model', params, config=models.describe(module))
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    runs = [
      start(4, folder / 'model', folder / 'two', address, 2, i)
      for i in range(2)
    ]
    told = []
    for run in runs:
      out, err = run.communicate(timeout=300)
      self.assertEqual(run.returncode, 0, err[-3000:])
      told.append(json.loads(out.splitlines()[-1]))
    answering.add_task()
    answering.answer(folder / 'model', folder / 'one' / 'answers')
    answering.score(folder / 'model', folder / 'one')
    # Both ended after the batch at which one was asked to.
    for found in told:
      self.assertEqual(found['code'], 128 + signal.SIGTERM)
      self.assertEqual(found['batches'], 1)
      self.assertNotIn(FILE, found['files'])
    one, two = folder / 'one', folder / 'two'
    lines = zip(self.lines(one), self.lines(two), strict=True)
    for row, other in lines:
      score, again = row.pop('aux'), other.pop('aux')
      self.assertEqual(row, other)
      self.assertAlmostEqual(score['scores'], again['scores'], places=4)
    a, b = [json.loads((f / 'scores.json').read_text()) for f in (one, two)]
    self.assertEqual(self.rounded(a), self.rounded(b))
    self.assertFalse((two / 'answers' / 'alive').exists())

  def lines(self, folder):
    lines = (folder / 'answers' / FILE).read_text().splitlines()
    self.assertLen(lines, 10)
    return map(json.loads, lines)

  def rounded(self, data):
    return json.loads(
      json.dumps(data), parse_float=lambda x: round(float(x), 5)
    )


if __name__ == '__main__':
  absltest.main()
