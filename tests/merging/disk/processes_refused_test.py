# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in one process of a merge, as the others hear of it."""

import json
import pathlib
import socket

from absl.testing import absltest
import models_on_disk
import numpy as np
import process_groups

import mergejax as mj
from mergejax.core import errors
from mergejax.merging.disk import meeting
from mergejax.merging.disk import processes
from mergejax.merging.disk import shares


class RefusalsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(process_groups.small_pieces())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    for name in 'ab':
      models_on_disk.save(self.folder / name, models_on_disk.llama(rng))
    self.recipe = {
      'merge_method': 'linear',
      'models': [str(self.folder / 'a'), str(self.folder / 'b')],
    }
    self.out = self.folder / 'out'

  def outcomes(self, recipes=None, **options):
    """What each of two processes raised or returned."""
    recipes = recipes or [self.recipe] * 2

    def work(group):
      plan = mj.plan(recipes[group.index])
      return mj.execute(plan, self.out, group=group, **options)

    return process_groups.run(2, work)

  def test_a_folder_that_one_cannot_see(self):
    missing = {**self.recipe, 'models': [str(self.folder / 'a'), '/mnt/b']}
    seeing, other = self.outcomes([self.recipe, missing])
    self.assertIsInstance(other, mj.UserError)
    self.assertIn('no checkpoint at /mnt/b', other.message)
    self.assertIsInstance(seeing, processes.Lost)
    self.assertRegex(
      str(seeing), r'Process 1 of 2 \(.*\) failed: There is no .* /mnt/b'
    )
    self.assertFalse(self.out.exists())

  def test_other_files_under_the_same_paths(self):
    models = self.recipe['models']
    first, other = self.outcomes(
      [self.recipe, {**self.recipe, 'models': models[::-1]}]
    )
    self.assertRegex(
      other.message, '(?s)Process 1 of 2 does not see what the first.*plan'
    )
    self.assertIsInstance(first, processes.Lost)

  def test_numbers_that_are_not_finite(self):
    model = models_on_disk.llama(np.random.default_rng(0))
    path = list(shares.divide(mj.plan(self.recipe), 2)[1])[-1]
    model[path][-1] = np.nan
    models_on_disk.save(self.folder / 'b', model)
    first, other = self.outcomes()
    self.assertRegex(other.message, f'{path} has .* number.*not finite')
    self.assertRegex(str(first), f'Process 1 of 2 .* failed: .*{path}')
    self.assertFalse(self.out.exists())

  def stopped(self):
    """The outcomes of two processes, the second of which is asked to stop."""

    def work(group):
      def stop(done, total):
        if group.index:
          raise errors.Stopped('as asked')

      plan = mj.plan(self.recipe)
      return mj.execute(plan, self.out, group=group, progress=stop)

    return process_groups.run(2, work)

  def test_one_is_asked_to_stop(self):
    first, other = self.stopped()
    self.assertIsInstance(other, errors.Stopped)
    self.assertIsInstance(first, errors.Stopped)
    self.assertRegex(str(first), r'Process 1 of 2 \(.*\) was asked to stop')
    self.assertFalse(self.out.exists())
    done = [
      set((self.folder / '.out.partial' / name).read_text().splitlines()[1:])
      for name in ('journal', 'journal-1')
    ]
    self.assertNotEmpty(done[1])
    shared = shares.divide(mj.plan(self.recipe), 2)
    left = set()
    for own, mine in zip(done, shared):
      left |= {path for path in mine if json.dumps(path) not in own}
    for report in self.outcomes():
      self.assertEqual(report.computed, len(left))
    for report in self.outcomes():
      self.assertEqual(report.computed, 0)

  def test_a_machine_that_was_started_anew_does_its_share_again(self):
    """What it had written may not have reached the disk."""
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    self.stopped()
    tasks = len(mj.plan(self.recipe).tasks)
    shared = shares.divide(mj.plan(self.recipe), 2)
    work = self.folder / '.out.partial'
    journal = work / 'journal'
    done = len((work / 'journal-1').read_text().splitlines()) - 1
    self.assertGreater(done, 0)
    record, *rows = journal.read_text().splitlines()
    record = json.loads(record)
    record['merge']['work']['boot'] = 'yesterday'
    rows += [json.dumps(path) for path in shared[0]]
    journal.write_text('\n'.join([json.dumps(record), *rows]) + '\n')
    name = 'model.safetensors'
    whole = (self.folder / 'whole' / name).read_bytes()
    for report in self.outcomes():
      self.assertBetween(report.computed, len(shared[0]), tasks - done + 1)
    self.assertEqual((self.out / name).read_bytes(), whole)

  def test_what_several_cannot_do_is_refused(self):
    for found in self.outcomes(format='npz'):
      self.assertRegex(found.message, 'cannot write one .npz archive together')
    nameless = {**self.recipe, 'merge_method': mj.linear()}
    for found in self.outcomes([nameless] * 2):
      self.assertRegex(found.message, 'same Merge without a name')

  def test_how_processes_meet(self):
    for wrong, message in (
      (('127.0.0.1', 2, 0), 'HOST:PORT'),
      (('127.0.0.1:1', None, 0), 'needs --process_count'),
      (('127.0.0.1:1', 2, 2), 'counts from 0 to 1'),
      ((None, 2, 0), 'Give --coordinator_address'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, message):
        meeting.join(*wrong)
    with self.assertRaisesRegex(errors.ConfigError, 'does not reach the first'):
      meeting.join('127.0.0.1:1', 2, 1, timeout=0.0)
    with socket.create_server(('127.0.0.1', 0)) as listener:
      with self.assertRaisesRegex(errors.ConfigError, 'did not come.*: 1, 2'):
        meeting._await(listener, 3, 0.05)


if __name__ == '__main__':
  absltest.main()
