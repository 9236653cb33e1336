# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Branch-Train-Merge as a user runs it: whole, killed, stopped, continued."""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

from absl.testing import absltest
import environments
import numpy as np
import one_command
import orbax.checkpoint as ocp
import pytest

import gin
import mergejax as mj
from mergejax.core import tree
from mergejax.data import mixtures
from mergejax.data import stream
from mergejax.data import tasks

_GIN = """
from __gin__ import dynamic_registration
from mergejax.nn import lm
from mergejax.cli import branch_train_merge

include 'runs/branch_train_merge.gin'
SEED_STEPS = 12
BRANCH_STEPS = 12
BATCH_SIZE = 4
LENGTH = 16
WARMUP_STEPS = 2
branch_train_merge.Settings.save_every = 3
branch_train_merge.Settings.validation_sequences = 8
branch_train_merge.Settings.test_sequences = 8
lm.LMConfig:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_layers = 1
  mlp_dim = 32
"""


class ResumeTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = (
      pathlib.Path(os.environ.get('PYTEST_TMP', '') or '/tmp')
      / f'resume_{os.getpid()}'
    )
    cls.folder.mkdir()
    rng = random.Random(0)
    for domain, words in {
      'colours': ['red', 'green', 'blue', 'grey'],
      'numbers': ['one', 'two', 'three', 'four'],
    }.items():
      (cls.folder / 'text').mkdir(exist_ok=True)
      rows = [' '.join(rng.choices(words, k=rng.randint(8, 30)))
              for _ in range(200)]  # fmt: skip
      (cls.folder / 'text' / f'{domain}.jsonl').write_text(
        '\n'.join(json.dumps({'text': row}) for row in rows)
      )
    (cls.folder / 'small.gin').write_text(_GIN)
    started = time.monotonic()
    cls.out = cls('finish').finish('whole')
    cls.took = time.monotonic() - started

  @classmethod
  def tearDownClass(cls):
    import shutil

    shutil.rmtree(cls.folder, ignore_errors=True)
    super().tearDownClass()

  def command(self, name):
    return [
      'train',
      f'--gin_file={self.folder}/small.gin',
      f'--gin.CORPORA={self.folder}/text',
      f'--gin.MODEL_DIR={self.folder}/{name}',
    ]

  def start(self, name, *flags, devices=1):
    return subprocess.Popen(
      [sys.executable, '-m', 'mergejax', *self.command(name), *flags],
      env=environments.of(devices),
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  def said(self, name):
    """`(exit code, stdout, stderr)` of a command that has nothing to train."""
    self.addCleanup(gin.clear_config)
    return one_command.run(*self.command(name))

  def stop(self, process, phase, name, with_signal):
    """Sends a signal as soon as a phase of a run has saved a step."""
    checkpoints = self.folder / name / 'train' / phase / 'checkpoints'
    while process.poll() is None and not list(checkpoints.glob('[0-9]*')):
      time.sleep(0.02)
    process.send_signal(with_signal)
    return process.communicate(timeout=600)

  def finish(self, name):
    process = self.start(name)
    out, err = process.communicate(timeout=600)
    self.assertEqual(process.returncode, 0, err[-3000:])
    return out

  def final(self, name):
    """Every phase's last state, and the batch its data would give next."""
    task_of = tasks.add_corpora(self.folder / name / 'corpora')
    mixtures.add_mixture('all', list(task_of.values()), rates='equal')
    states = {}
    for phase in ('seed', 'experts', 'dense'):
      folder = self.folder / name / 'train' / phase / 'checkpoints'
      step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
      state = ocp.PyTreeCheckpointer().restore(folder / str(step) / 'state')
      states[phase] = {'at': step, **tree.flatten(state)}
    seed_stream = stream.SeqioStream(
      'all', lengths={'targets': 16}, batch_size=4, pack=False, seed=0
    )
    position = (
      self.folder / name / 'train/seed/checkpoints/12/data/process_0'
    ).read_bytes()
    seed_stream.restore(position)
    states['data'] = {'position': seed_stream.position, **next(seed_stream)}
    return states

  def same(self, first, second):
    for part, expected in first.items():
      self.assertEqual(sorted(expected), sorted(second[part]))
      for path, leaf in expected.items():
        np.testing.assert_array_equal(
          leaf, second[part][path], err_msg=f'{part} {path}'
        )

  def same_as_whole(self, name, moments=()):
    """The states, tables and lines of a run are those of one without a stop."""
    self.same(self.final('whole'), self.final(name))
    tables = [
      json.loads((self.folder / run / 'table.json').read_text())['table']
      for run in ('whole', name)
    ]
    self.assertEqual(*tables, str(moments))
    steps = [
      json.loads(line)['step']
      for line in (self.folder / name / 'train/experts/metrics.jsonl')
      .read_text()
      .splitlines()
    ]
    self.assertEqual(steps, sorted(set(steps)))

  def test_a_whole_run_and_the_same_command_again(self):
    self.assertRegex(self.out, r'ensemble +\d')
    for name in (
        'report.md', 'table.json', 'heatmap.png', 'checkpoints/seed',
        'checkpoints/best_merge', 'checkpoints/experts/colours',
        'train/experts/metrics.jsonl', 'train/experts/events',
    ):  # fmt: skip
      self.assertTrue((self.folder / 'whole' / name).exists(), name)
    self.assertEqual(self.final('whole')['experts']['at'], 24)

    # A finished run is not computed again; other settings are refused.
    code, out, err = self.said('whole')
    self.assertEqual(code, 0, err)
    self.assertIn('nothing was computed', out)
    gin_file = self.folder / 'small.gin'
    gin_file.write_text(_GIN.replace('BATCH_SIZE = 4', 'BATCH_SIZE = 8'))
    self.addCleanup(gin_file.write_text, _GIN)
    code, _, err = self.said('whole')
    self.assertEqual(code, 2)
    self.assertIn('batch_size: 4 there, 8 asked for', err)

  def test_a_killed_and_continued_run_ends_with_the_same_bits(self):
    # SIGKILL while experts train: the seed is whole, they are not.
    process = self.start('once')
    self.stop(process, 'experts', 'once', signal.SIGKILL)
    self.assertEqual(process.returncode, -signal.SIGKILL)
    self.finish('once')
    self.same_as_whole('once')

  @pytest.mark.slow  # further moments; SIGTERM is also of `training/train_test`
  def test_a_killed_stopped_and_continued_run_ends_with_the_same_bits(self):
    self.stop(self.start('stopped'), 'seed', 'stopped', signal.SIGKILL)
    # SIGTERM while experts train: everything is saved, exit code 0.
    process = self.start('stopped')
    _, err = self.stop(process, 'experts', 'stopped', signal.SIGTERM)
    self.assertEqual(process.returncode, 0, err[-2000:])
    if not (self.folder / 'stopped' / 'table.json').exists():
      self.assertRegex(err, r'Stopped (at step \d+ of|outside of) .*is saved')
    self.finish('stopped')
    self.same_as_whole('stopped')

  @pytest.mark.slow
  def test_a_run_killed_at_any_moments_ends_with_the_same_bits(self):
    # SIGKILL at random moments of what is left to do, then to the end. The
    # whole run compiled what the others load: they need two thirds of its time.
    rng = random.Random(time.time())
    moments = []
    for _ in range(5):
      process = self.start('killed')
      moments.append(rng.uniform(0.2, 0.65) * self.took)
      try:
        process.communicate(timeout=moments[-1])
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    self.finish('killed')
    self.same_as_whole('killed', moments)

  def test_too_little_text_and_an_empty_folder(self):
    text = self.folder / 'text' / 'tiny.txt'
    text.write_text('Only one short sentence here.')
    self.addCleanup(text.unlink)
    code, _, err = self.said('refused')
    self.assertEqual(code, 2, err[-2000:])
    self.assertRegex(err, 'tiny: 0 bytes of train text, 64 needed')
    self.assertNotIn('Traceback', err)
    self.assertNotIn('In call to configurable', err)
    self.assertFalse((self.folder / 'refused' / 'corpora').exists())

  def losses(self, name):
    rows = {}
    for phase in ('seed', 'experts', 'dense'):
      file = self.folder / name / 'train' / phase / 'metrics.jsonl'
      for line in file.read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
          if key.startswith('loss'):
            rows[f'{phase} {row["step"]} {key}'] = value
    return rows

  @pytest.mark.slow  # `training/processes_test` keeps the promise for all runs
  def test_two_processes_then_one_give_the_same_losses(self):
    # That eight devices do is a law of the trainer, see `branch_test`.
    mesh = "--gin.MESH={'branch': 2, 'data': 1}"
    # Two processes are killed among their experts; one goes on with what each
    # of them saved, then the table is that of a run which nobody touched.
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    join = [f'--coordinator_address={address}', '--process_count=2']
    pair = [
      self.start('pair', mesh, *join, f'--process_index={i}') for i in range(2)
    ]
    checkpoints = self.folder / 'pair' / 'train' / 'experts' / 'checkpoints'
    while all(p.poll() is None for p in pair) and not list(
      checkpoints.glob('[0-9]*/data/process_1')
    ):
      time.sleep(0.05)
    for process in pair:
      process.send_signal(signal.SIGKILL)
    errors = [process.communicate(timeout=600)[1] for process in pair]
    self.assertTrue(checkpoints.exists(), errors[0][-3000:])
    one = self.start('pair', mesh, devices=2)
    _, err = one.communicate(timeout=600)
    self.assertEqual(one.returncode, 0, err[-3000:])
    self.assertIn('processes: 2 there, 1 asked for', err)
    expected = self.losses('whole')
    self.assertLen(expected, 2 + 2 * 2 + 2)
    found = self.losses('pair')
    self.assertEqual(sorted(found), sorted(expected))
    for key, value in expected.items():
      np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)

  def test_the_best_merge_loads(self):
    module, params = mj.load_model(self.folder / 'whole/checkpoints/best_merge')
    seed = mj.open_checkpoint(self.folder / 'whole/checkpoints/seed').specs()
    self.assertEqual(mj.models.family_of(module).specs(), seed)
    names = dict(expected_name='the seed', given_name='the best merge')
    tree.check_same(seed, tree.specs(params), **names)
    self.assertEqual(module.config.emb_dim, 16)
    report = (self.folder / 'whole' / 'report.md').read_text()
    self.assertLen(re.findall(r'- (?:held|did NOT hold):', report), 3)


if __name__ == '__main__':
  absltest.main()
