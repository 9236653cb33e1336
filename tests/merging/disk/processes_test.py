# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merges by several processes: the bytes of one, or nothing that looks so."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest
import environments
import models_on_disk
import numpy as np
import process_groups
import pytest

import mergejax as mj
from mergejax.checkpoints import chunked
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.merging.disk import shares

_PREPARE = """
import json, os, sys, time
from mergejax.merging.disk import meeting, pieces, plans
plans.PIECE, pieces._SIZES = 64, (16, 64)
"""
# Merges what a file lists, and counts what is read of safetensors files.
_SEVERAL = (
  _PREPARE
  + """
import mergejax as mj
count, read = [0], os.preadv
def counted(*args):
  found = read(*args)
  count[0] += found
  return found
os.preadv = counted
address, size, index, work = sys.argv[1:]
by_hand = (address, int(size), int(index))
with meeting.join(*([] if 'SLURM_NTASKS' in os.environ else by_hand)) as group:
  for recipe, out, form in json.load(open(work)):
    count[0] = 0
    report = mj.execute(mj.plan(recipe), out, format=form, group=group)
    print(json.dumps([report.computed, list(report.read_by), count[0]]))
"""
)
# The command itself, slow enough to be hit.
_COMMAND = (
  _PREPARE
  + """
plans.WORKERS, merge = 1, pieces.Leaf.merge
def slow(self, write):
  time.sleep(0.2)
  merge(self, write)
pieces.Leaf.merge = slow
from mergejax.cli import main
address, size, index, *arguments = sys.argv[1:]
join = [f'--coordinator_address={address}', f'--process_count={size}',
        f'--process_index={index}']
sys.exit(main.main(['merge', *arguments, *join]))
"""
)


def slurm(index, count, job):
  """What Slurm says to the processes of a job on this machine."""
  said = {
    'JOB_ID': job, 'STEP_NODELIST': 'localhost', 'NTASKS': count,
    'PROCID': index, 'LOCALID': index,
  }  # fmt: skip
  return {f'SLURM_{name}': str(value) for name, value in said.items()}


def start(code, count, *arguments, job=None):
  """The processes of a group, running; by hand, or as a job of Slurm."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  return [
    subprocess.Popen(
      [sys.executable, '-c', code, address, str(count), str(i), *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=environments.of(**(slurm(i, count, job) if job else {})),
    )
    for i in range(count)
  ]  # fmt: skip


def t5(rng):
  """Parameters with T5X's names; the embedding is a third of them."""
  shapes = {'token_embedder/embedding': (60, 12)}
  for side in ('encoder', 'decoder'):
    shapes[f'{side}/layers_0/mlp/wi/kernel'] = (12, 31)
    shapes[f'{side}/layers_0/mlp/wo/kernel'] = (31, 12)
    shapes[f'{side}/{side}_norm/scale'] = (12,)
  return {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}


class ProcessesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(process_groups.small_pieces())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.rng = np.random.default_rng(0)

  def models(self, kind, names='pab'):
    """Saves models in a format; gives their paths, the base's first."""
    paths = []
    for name in names:
      path = self.folder / f'{kind}-{name}'
      if kind == 'safetensors':
        model = models_on_disk.llama(self.rng, layers=2)
        models_on_disk.save(path, model)
        self.stats(path, model)
      else:
        leaves = t5(self.rng)
        with mock.patch.object(chunked, 'CHUNK', 200):
          writer = chunked.Writer(path, kind, tree_lib.specs(leaves))
          writer.create()
          for one in writer.chunks():
            flat = leaves[one.path].reshape(-1)
            writer.write(one, flat[one.start : one.start + one.size])
          writer.finish()
      paths.append(str(path))
    return paths

  def stats(self, path, model):
    found = models_on_disk.statistics('fisher', model, self.rng)
    flat = {f'{p}/{n}': x for p, own in found.items() for n, x in own.items()}
    mj.save_checkpoint(f'{path}.fisher.safetensors', flat)

  def recipe(self, paths, method, base=True, stats=None, **options):
    found = {'merge_method': method, 'models': paths[1:], 'parameters': options}
    if base:
      found['base_model'] = paths[0]
    if stats is not None:
      found['stats'] = [f'{p}.{stats}.safetensors' for p in paths[1:]]
    return found

  def same(self, first, second):
    """The files of safetensors results, the leaves of others."""
    if list(first.glob('*.safetensors')):
      names = {file.name for file in first.iterdir()}
      self.assertEqual(names, {file.name for file in second.iterdir()})
      for name in names:
        same = (first / name).read_bytes() == (second / name).read_bytes()
        self.assertTrue(same, f'{second / name} differs')
      return
    one, other = map(mj.open_checkpoint, (first, second))
    self.assertEqual(one.provenance['format'], other.provenance['format'])
    expected, found = (
      tree_lib.flatten(one.read()),
      tree_lib.flatten(other.read()),
    )
    self.assertEqual(list(expected), list(found))
    for path, leaf in expected.items():
      self.assertEqual(leaf.dtype, found[path].dtype)
      self.assertEqual(leaf.tobytes(), found[path].tobytes(), path)

  def reads(self, count, work, job):
    """Does work by so many processes; what each of them read of each item."""
    file = self.folder / 'work.json'
    file.write_text(json.dumps(work))
    started = start(_SEVERAL, count, str(file), job=job)
    said = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, said):
      self.assertEqual(process.returncode, 0, err[-3000:])
    lines = [
      # XLA tells on the same stream who is connected.
      [json.loads(line) for line in out.splitlines() if 'Gloo' not in line]
      for out, _ in said
    ]
    self.assertLen(lines[0], len(work))
    return list(zip(*lines))

  def compare(self, count, recipes, job=None):
    """Merges by one process and by several; gives what those read."""
    work = []
    for k, (recipe, form) in enumerate(recipes):
      mj.execute(mj.plan(recipe), self.folder / f'one-{k}', format=form)
      work.append([recipe, str(self.folder / f'all-{count}-{k}'), form])
    found = self.reads(count, work, job)
    for k, _ in enumerate(recipes):
      self.same(self.folder / f'one-{k}', self.folder / f'all-{count}-{k}')
    self.assertFalse(list(self.folder.glob('.*')))
    return found

  def test_two_processes_give_the_bytes_of_one(self):
    paths = self.models('safetensors')
    pair = [paths[0], paths[1]]
    recipes = [
      (self.recipe(paths, 'linear', base=False), None),
      (self.recipe(paths, 'ties', density=0.4, trim_scope='tensor'), None),
      (self.recipe(paths, 'ties', density=0.4, trim_scope='global'), None),
      (self.recipe(pair, 'slerp', t=0.3), None),
      (self.recipe(paths, 'dare_ties', density=0.6), 'orbax'),
      (self.recipe(paths, 'task_arithmetic'), None),
      (self.recipe(paths, 'fisher', base=False, stats='fisher'), None),
    ]
    for kind, form in (('orbax', 't5x'), ('t5x', 'orbax')):
      own = [None, *self.models(kind, 'ab')]
      recipes.append((self.recipe(own, 'linear', base=False), form))
    # As a job of Slurm; a command that is killed below is told by hand. JAX
    # derives the port from the number of the job.
    found = self.compare(2, recipes, job=os.getpid())
    # Of the models of a linear merge, each has read its half and no more.
    plan = mj.plan(recipes[0][0])
    for (computed, read_by, counted), index in zip(found[0], range(2)):
      self.assertLen(plan.tasks, computed)
      self.assertEqual(read_by[index], counted)
      self.assertBetween(
        counted, 0.45 * plan.read_bytes, 0.55 * plan.read_bytes
      )
    self.assertEqual(sum(found[0][0][1]), plan.read_bytes)
    # Chunks of a few rows are read by whoever needs them.
    read_by, plan = found[7][0][1], mj.plan(recipes[7][0])
    self.assertLess(max(read_by), 0.55 * plan.read_bytes)

  def test_stacks_are_divided_between_their_slices(self):
    """Along any axis, with statistics that lie by slice."""
    paths = []
    for name in 'pab':
      shapes = {'x/kernel': (5, 6, 12), 'y/kernel': (6, 5, 12)}
      model = {
        p: self.rng.normal(size=s).astype(np.float32) for p, s in shapes.items()
      }
      inputs = self.rng.normal(size=(2, 6, 20, 5)).astype(np.float32)
      grams = {
        f'{path}/gram': np.swapaxes(x, 1, 2) @ x / 20
        for path, x in (
          ('x/kernel', inputs[0]),
          ('y/kernel', inputs[1]),
        )
      }
      paths.append(str(self.folder / f'{name}.safetensors'))
      mj.save_checkpoint(paths[-1], model)
      mj.save_checkpoint(f'{paths[-1]}.gram.safetensors', grams)
    axes = [
      ['x/kernel', ['embed', 'layers', 'mlp']],
      ['y/kernel', ['layers', 'embed', 'mlp']],
    ]
    for method, options in (
      ('ties', {'density': 0.4, 'trim_scope': 'tensor'}),
      ('regmean', {'base': False, 'stats': 'gram'}),
    ):
      recipe = {**self.recipe(paths, method, **options), 'axes': axes}
      plan = mj.plan(recipe)
      mj.execute(plan, self.folder / method / 'one')
      reports = process_groups.execute(4, recipe, self.folder / method / 'all')
      self.same(self.folder / method / 'one', self.folder / method / 'all')
      divided = [own for own in shares.divide(plan, 4)[1].values()]
      self.assertTrue(all(own.divided for own in divided), divided)
      self.assertLess(max(reports[0].read_by), 0.35 * sum(reports[0].read_by))

  @pytest.mark.slow
  def test_four_processes_give_the_bytes_of_one(self):
    paths = self.models('safetensors')
    recipes = [
      (self.recipe(paths, 'linear', base=False), None),
      (self.recipe(paths, 'ties', density=0.4, trim_scope='global'), 'orbax'),
      (
        self.recipe([None, *self.models('orbax', 'ab')], 'linear', False),
        't5x',
      ),
    ]
    found = self.compare(4, recipes)
    plan = mj.plan(recipes[0][0])
    for _, _, counted in found[0]:
      self.assertBetween(counted, 0.2 * plan.read_bytes, 0.3 * plan.read_bytes)
    divided = [
      own.task.path
      for mine in shares.divide(plan, 4)
      for own in mine.values()
      if own.divided
    ]
    self.assertNotEmpty(divided)

  def test_one_is_killed_and_the_same_command_continues(self):
    recipe = self.recipe(
      self.models('safetensors'), 'ties', density=0.4, trim_scope='global'
    )
    file = self.folder / 'recipe.json'  # JSON is YAML
    file.write_text(json.dumps(recipe))
    mj.execute(mj.plan(mj.load_recipe(file)), self.folder / 'whole')
    out, work = self.folder / 'out', self.folder / '.out.partial'
    for victim in (1, 0):
      journal = work / ('journal-1' if victim else 'journal')
      before = self.merged(journal)
      started = start(_COMMAND, 2, str(file), str(out))
      self.await_merged(journal, started, before + 1)
      started[victim].send_signal(signal.SIGKILL)
      other = started[1 - victim]
      began = time.monotonic()
      _, err = other.communicate(timeout=60)
      self.assertLess(time.monotonic() - began, 20)
      started[victim].communicate()
      self.assertEqual(other.returncode, 1, err)
      self.assertRegex(
        err,
        rf'Process {victim} of 2 is gone: it was killed.*out is not complete. '
        'Start all processes again with the same command',
      )
      self.assertNotIn('Traceback', err)
      self.assertFalse(out.exists())
      with self.assertRaises(errors.UserError):
        mj.open_checkpoint(work)
    merged = self.merged(work / 'journal') + self.merged(work / 'journal-1')
    self.assertGreaterEqual(merged, 2)
    started = start(_COMMAND, 2, str(file), str(out))
    said = [process.communicate(timeout=300) for process in started]
    for process, (_, err) in zip(started, said):
      self.assertEqual(process.returncode, 0, err)
    self.assertIn('by 2 processes', said[0][0])
    self.assertEmpty(said[1][0])  # the first one talks
    left = len(mj.plan(recipe).tasks) - merged
    self.assertBetween(
      int(said[0][0].split('out: ')[1].split()[0]), left, left + 2
    )
    self.same(self.folder / 'whole', out)
    self.assertFalse(list(self.folder.glob('.*')))

  def merged(self, journal):
    """How many lines a journal has below its statement of the work."""
    text = journal.read_text() if journal.exists() else ''
    return max(0, text.count('\n') - 1)

  def await_merged(self, journal, started, count):
    """Waits until a journal tells of so many parameters."""
    while self.merged(journal) < count:
      for process in started:
        if process.poll() is not None:
          self.fail(process.communicate()[1])
      time.sleep(0.01)


if __name__ == '__main__':
  absltest.main()
