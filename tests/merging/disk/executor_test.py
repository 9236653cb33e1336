# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Streamed merges: resumable, whole or not there."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import environments
import ml_dtypes
import models_on_disk
import numpy as np
import pytest

import mergejax as mj
from mergejax.core import errors
from mergejax.core import identity
from mergejax.core import tree as tree_lib
from mergejax.merging.disk import executor
from mergejax.merging.disk import work_folder


class WholeOrNothingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    for name in ('base', 'a', 'b'):
      models_on_disk.save(
        self.folder / name, models_on_disk.llama(rng, ml_dtypes.bfloat16)
      )
    # Several options: their order must not count.
    self.recipe = {
      'merge_method': 'della',
      'base_model': str(self.folder / 'base'),
      'models': [str(self.folder / 'a'), str(self.folder / 'b')],
      'parameters': {'density': 0.5, 'epsilon': 0.1, 'lambda': 0.9},
    }

  def files(self, out):
    return {
      f.name: f.read_bytes() for f in sorted(out.iterdir()) if f.is_file()
    }

  def test_result_is_complete_with_its_papers(self):
    out = self.folder / 'out'
    report = mj.execute(mj.plan(self.recipe), out)
    self.assertGreater(report.computed, 0)
    self.assertCountEqual(
      [f.name for f in out.iterdir()],
      ['model.safetensors', 'config.json', 'recipe.yaml', 'manifest.json',
       'README.md', 'tokenizer.json', 'generation_config.json'],
    )  # fmt: skip
    manifest = json.loads((out / 'manifest.json').read_text())
    sums = manifest['sources']
    self.assertLen(sums, 3)
    for file, digest in sums.items():
      import hashlib

      self.assertEqual(
        hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest(), digest
      )
    self.assertFalse(list(self.folder.glob('.*')))
    again = mj.load_recipe(out / 'recipe.yaml')
    self.assertEqual(again.method, 'della')

  def test_a_finished_result_is_not_computed_again(self):
    out = self.folder / 'out'
    mj.execute(mj.plan(self.recipe), out)
    before = (out / 'model.safetensors').stat().st_mtime_ns
    report = mj.execute(mj.plan(self.recipe), out)
    self.assertEqual(report.computed, 0)
    self.assertEqual((out / 'model.safetensors').stat().st_mtime_ns, before)
    other = dict(self.recipe, parameters={'density': 0.6})
    with self.assertRaisesRegex(mj.UserError, 'already exists and is not'):
      mj.execute(mj.plan(other), out)

  def test_interrupted_after_any_leaf_gives_the_same_bytes(self):
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    whole = self.files(self.folder / 'whole')

    class Killed(BaseException):
      pass

    tasks = len(mj.plan(self.recipe).tasks)
    for stop_after in (1, 3, 7, tasks):
      out = self.folder / f'out{stop_after}'
      calls = []

      def kill(done, total, calls=calls, limit=stop_after):
        calls.append(done)
        if len(calls) == limit:
          raise Killed

      with self.assertRaises(Killed):
        mj.execute(mj.plan(self.recipe), out, progress=kill)
      self.assertFalse(out.exists())
      report = mj.execute(mj.plan(self.recipe), out)
      # Threads may have merged a few more before they heard of it.
      self.assertLessEqual(report.computed, tasks - stop_after)
      self.assertEqual('nothing' in report.describe(), not report.computed)
      self.assertEqual(self.files(out), whole)

  def test_a_file_that_lost_its_size_is_written_again(self):
    def stop(done, total):
      if done > total // 2:
        raise KeyboardInterrupt

    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    with self.assertRaises(KeyboardInterrupt):
      mj.execute(mj.plan(self.recipe), self.folder / 'out', progress=stop)
    file = self.folder / '.out.partial' / 'result' / 'model.safetensors'
    os.truncate(file, 100)
    mj.execute(mj.plan(self.recipe), self.folder / 'out')
    self.assertEqual(
      self.files(self.folder / 'out'), self.files(self.folder / 'whole')
    )

  def test_a_file_written_again_does_not_count_as_merged_later(self):
    def stop(done, total):
      if done > total // 2:
        raise KeyboardInterrupt

    def first(done, total):
      raise KeyboardInterrupt

    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    out = self.folder / 'out'
    with self.assertRaises(KeyboardInterrupt):
      mj.execute(mj.plan(self.recipe), out, progress=stop)
    os.truncate(
      self.folder / '.out.partial' / 'result' / 'model.safetensors', 100
    )
    with self.assertRaises(KeyboardInterrupt):  # the file has its size again
      mj.execute(mj.plan(self.recipe), out, progress=first)
    mj.execute(mj.plan(self.recipe), out)
    self.assertEqual(self.files(out), self.files(self.folder / 'whole'))

  def test_sigterm_ends_between_parameters(self):
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    out, tasks = self.folder / 'out', len(mj.plan(self.recipe).tasks)
    asked = []

    def ask(done, total):
      if not asked:
        asked.append(done)
        os.kill(os.getpid(), signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, r'\.out\.partial'):
      mj.execute(mj.plan(self.recipe), out, progress=ask)
    self.assertFalse(out.exists())
    report = mj.execute(mj.plan(self.recipe), out)
    self.assertBetween(report.computed, 1, tasks - 1)
    self.assertEqual(self.files(out), self.files(self.folder / 'whole'))

  def test_a_changed_source_starts_afresh(self):
    out = self.folder / 'out'

    def kill(done, total):
      raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      mj.execute(mj.plan(self.recipe), out, progress=kill)
    rng = np.random.default_rng(5)
    models_on_disk.save(
      self.folder / 'a', models_on_disk.llama(rng, ml_dtypes.bfloat16)
    )
    report = mj.execute(mj.plan(self.recipe), out)
    self.assertLen(mj.plan(self.recipe).tasks, report.computed)

  def test_not_finite_source_names_tensor_and_leaves_nothing(self):
    rng = np.random.default_rng(0)
    model = models_on_disk.llama(rng, ml_dtypes.bfloat16)
    model['model.layers.1.mlp.up_proj.weight'][3, 2:5] = np.nan
    models_on_disk.save(self.folder / 'b', model)
    with self.assertRaisesRegex(
      mj.UserError,
      r'b: model.layers.1.mlp.up_proj.weight has 3 number.*not finite',
    ):
      mj.execute(mj.plan(self.recipe), self.folder / 'out')
    self.assertFalse((self.folder / 'out').exists())
    self.assertFalse(list(self.folder.glob('.out*')))

  def test_full_disk_keeps_what_is_done_and_continues(self):
    out = self.folder / 'out'
    real = os.pwrite
    left = [4]

    def pwrite(file, data, position):
      if left[0] == 0:
        raise OSError(28, 'No space left on device')
      left[0] -= 1
      return real(file, data, position)

    with mock.patch.object(executor.os, 'pwrite', pwrite):
      with self.assertRaisesRegex(mj.UserError, 'No space left.*same command'):
        mj.execute(mj.plan(self.recipe), out)
    self.assertFalse(out.exists())
    mj.execute(mj.plan(self.recipe), out)
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    self.assertEqual(self.files(out), self.files(self.folder / 'whole'))

  def test_a_disk_that_fails_behind_the_merge_is_told(self):
    failing = mock.Mock(side_effect=OSError(5, 'Input/output error'))
    with mock.patch.object(work_folder.os, 'fdatasync', failing):
      with self.assertRaisesRegex(OSError, 'Input/output'):
        with work_folder.writing_behind([0]):
          while not failing.called:
            time.sleep(0.01)
    self.assertEqual(failing.call_count, 1)

  def test_too_small_a_disk_is_known_before(self):
    usage = mock.Mock(free=100)
    with mock.patch.object(
      work_folder.shutil, 'disk_usage', return_value=usage
    ):
      with self.assertRaisesRegex(mj.UserError, 'more and the disk has'):
        mj.execute(mj.plan(self.recipe), self.folder / 'out')
    self.assertFalse(list(self.folder.glob('.out*')))

  def test_two_merges_of_one_output_do_not_mix(self):
    out = self.folder / 'out'
    inner = []

    def second(done, total):
      if not inner:
        inner.append(1)
        with self.assertRaisesRegex(errors.UserError, 'Another merge'):
          mj.execute(mj.plan(self.recipe), out)

    mj.execute(mj.plan(self.recipe), out, progress=second)
    self.assertTrue(out.exists())

  def test_a_failed_merge_cleans_up_before_it_lets_go(self):
    """Another process that waits for the lock must not lose its files."""
    models_on_disk.save(
      self.folder / 'b',
      {
        path: np.full_like(leaf, np.nan)
        for path, leaf in models_on_disk.llama(
          np.random.default_rng(0), ml_dtypes.bfloat16
        ).items()
      },
    )
    locked = []
    real = work_folder.shutil.rmtree

    def rmtree(path, **options):
      with open(path / 'lock', 'rb') as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          locked.append(False)
        except BlockingIOError:
          locked.append(True)
      real(path, **options)

    with mock.patch.object(work_folder.shutil, 'rmtree', rmtree):
      with self.assertRaisesRegex(mj.UserError, 'not finite'):
        mj.execute(mj.plan(self.recipe), self.folder / 'out')
    self.assertEqual(locked, [True])

  def test_a_lock_on_a_removed_file_is_no_lock(self):
    folder = work_folder.WorkFolder(self.folder / 'out')
    real = work_folder.fcntl.flock
    removed = []

    def flock(file, operation):
      if not removed:
        removed.append(True)
        folder.remove()  # as another process does when it has finished
      real(file, operation)

    with mock.patch.object(work_folder.fcntl, 'flock', flock):
      with folder.locked():
        self.assertTrue((folder.path / 'lock').exists())

  def test_results_of_other_code_are_told_apart(self):
    out = self.folder / 'out'
    mj.execute(mj.plan(self.recipe), out)
    code = {**identity.code(), 'mergejax': 'other'}
    with mock.patch.object(identity, 'code', lambda: code):
      with self.assertRaisesRegex(
        mj.UserError,
        r'by another version of the code.*\n  mergejax: \w+\.\.\. there, other asked',
      ):
        mj.execute(mj.plan(self.recipe), out)

  def test_what_has_its_name_is_on_the_disk(self):
    synced = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(file):
      synced.append(os.readlink(f'/proc/self/fd/{file}'))
      real_sync(file)

    def rename(source, target):
      if target == self.folder / 'out':
        files = {str(f) for f in source.rglob('*')} | {str(source)}
        self.assertContainsSubset(files, synced)
        self.assertIn(str(source / 'model.safetensors'), files)
      real_rename(source, target)

    with mock.patch.multiple(os, fsync=fsync, rename=rename):
      mj.execute(mj.plan(self.recipe), self.folder / 'out')
    self.assertEqual(synced[-1], str(self.folder))

  @parameterized.parameters('orbax', 't5x', 'npz', 'safetensors')
  def test_every_format_holds_the_same_numbers(self, form):
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    name = {'npz': 'o.npz', 't5x': 'checkpoint_0'}.get(form, 'o')
    out = self.folder / name
    mj.execute(mj.plan(self.recipe), out, format=form)
    expected = tree_lib.flatten(
      mj.open_checkpoint(self.folder / 'whole').read()
    )
    found = tree_lib.flatten(mj.open_checkpoint(out).read())
    self.assertEqual(mj.open_checkpoint(out).provenance['format'], form)
    for path, leaf in expected.items():
      np.testing.assert_array_equal(
        np.asarray(leaf).view(np.uint16),
        np.asarray(found[path]).view(np.uint16),
      )

  def test_shards_of_a_chosen_size(self):
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    out = self.folder / 'out'
    mj.execute(mj.plan(self.recipe), out, max_shard_bytes=1000)
    files = list(out.glob('*.safetensors'))
    self.assertGreater(len(files), 2)
    a = tree_lib.flatten(mj.open_checkpoint(self.folder / 'whole').read())
    b = tree_lib.flatten(mj.open_checkpoint(out).read())
    for path, leaf in a.items():
      self.assertEqual(leaf.tobytes(), b[path].tobytes())

  def test_holds_no_more_than_the_plan_says(self):
    self.check_memory('ties')

  @pytest.mark.slow
  def test_random_methods_hold_no_more_than_the_plan_says(self):
    self.check_memory('dare_ties', 'della')

  def check_memory(self, *methods):
    """In a process of its own, beyond what a small merge has loaded."""
    rng = np.random.default_rng(0)
    for size, rows in (('small', 8), ('large', 6000)):
      for name in ('base', 'a', 'b'):
        leaf = rng.integers(0, 9, size=(rows, 1024)).astype(ml_dtypes.bfloat16)
        mj.save_checkpoint(
          self.folder / f'{size}-{name}.safetensors', {'w.weight': leaf}
        )
    code = (
      'import resource, sys\n'
      'import mergejax as mj\n'
      'rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n'
      'folder, method = sys.argv[1:]\n'
      'def run(size):\n'
      '  path = lambda n: f"{folder}/{size}-{n}.safetensors"\n'
      '  plan = mj.plan({"merge_method": method, "base_model": path("base"),\n'
      '      "models": [path("a"), path("b")], "parameters": {"density": 0.5}})\n'
      '  mj.execute(plan, f"{folder}/{method}-{size}.safetensors")\n'
      '  return plan.peak_bytes\n'
      'run("small")\n'
      'before = rss()\n'
      'allowed = run("large")\n'
      'print(rss() - before, allowed)\n'
    )
    for method in methods:
      done = subprocess.run(
        [sys.executable, '-c', code, str(self.folder), method],
        check=True, capture_output=True, text=True,
        env=environments.of(),
      )  # fmt: skip
      used, allowed = map(int, done.stdout.split()[-2:])
      self.assertLess(used, allowed, method)

  def test_sigkill_then_the_same_command(self):
    self.check_killed(1)

  @pytest.mark.slow
  def test_sigkill_three_times_then_the_same_command(self):
    self.check_killed(3)

  def check_killed(self, times):
    """The real thing, on a merge slow enough to be hit."""
    recipe = self.folder / 'recipe.json'  # JSON is YAML
    recipe.write_text(json.dumps(self.recipe))
    command = lambda out: [
      sys.executable, '-c',
      'import sys, time\n'
      'from mergejax.merging.disk import pieces\n'
      'merge = pieces.Leaf.merge\n'
      'def slow(self, write):\n'
      '  time.sleep(0.05)\n'
      '  merge(self, write)\n'
      'pieces.Leaf.merge = slow\n'
      'from mergejax.cli import main\n'
      f'sys.exit(main.main(["merge", {str(recipe)!r}, {str(out)!r}]))',
    ]  # fmt: skip
    mj.execute(mj.plan(self.recipe), self.folder / 'whole')
    out = self.folder / 'killed'
    rng = np.random.default_rng(0)
    work = self.folder / '.killed.partial' / 'journal'

    def merged():
      """How many lines it has below its statement of the work."""
      return max(0, work.read_text().count('\n') - 1) if work.exists() else 0

    for _ in range(times):
      process = subprocess.Popen(
        command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
      )
      before = merged()
      while process.poll() is None:
        if merged() > before:
          time.sleep(rng.uniform(0, 0.1))
          process.send_signal(signal.SIGKILL)
          break
        time.sleep(0.005)
      process.wait()
    # What was done counts, though every process hashes in another order.
    lines = work.read_text().split('\n')[
      1:-1
    ]  # below the statement of the work
    done = set(map(json.loads, lines))
    self.assertNotEmpty(done)
    left = len(mj.plan(self.recipe).tasks) - len(done)
    done = subprocess.run(command(out), check=True, capture_output=True)
    self.assertIn(f'{left} parameters', done.stdout.decode())
    self.assertEqual(mj.execute(mj.plan(self.recipe), out).computed, 0)
    self.assertEqual(self.files(out), self.files(self.folder / 'whole'))


if __name__ == '__main__':
  absltest.main()
