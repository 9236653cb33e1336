# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""An exported folder answers the same on one device and on eight."""

import contextlib
import functools
import io
import json
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np
import small_talkers

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.cli import main as main_lib
from mergejax.core import errors
from mergejax.evaluation import served as served_lib
from mergejax.evaluation import serving

ROOT = pathlib.Path(__file__).parents[2]
WIDTH = 8
SEED = 3


def inputs(rows=8):
  found = np.zeros((rows, WIDTH), np.int32)
  found[:, :3] = 60 + np.arange(3 * rows).reshape(rows, 3)
  found[3] = 0  # only fills the batch
  return found


def command(*arguments):
  """`(code, what it said)`."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    code = main_lib.main([*map(str, arguments)])
  return code, out.getvalue()


@functools.cache
def exported():
  """`(folder of a program of one device, of eight, what was said)`."""
  folder = pathlib.Path(tempfile.mkdtemp())
  module, params = small_talkers.build('t5x')
  mj.save_checkpoint(folder / 'model', params, config=models.describe(module))
  said = []
  for name, flags in (('one', ()), ('eight', ('--mesh', 'data=4,model=2'))):
    code, told = command(
      'export', folder / 'model', folder / name, '--input_length', WIDTH,
      '--length', 3, '--platforms', 'cpu', '--temperature', '2.0',
      *flags,
    )  # fmt: skip
    assert code == 0, told
    said.append(told)
  return folder / 'one', folder / 'eight', said


@functools.cache
def opened():
  return [served_lib.open_exported(path) for path in exported()[:2]]


class ServedTest(absltest.TestCase):
  def test_eight_devices_say_what_one_says(self):
    one, eight = (each(inputs(), SEED) for each in opened())
    np.testing.assert_array_equal(one['tokens'], eight['tokens'])
    np.testing.assert_allclose(
      one['scores'], eight['scores'], rtol=1e-5, atol=1e-5
    )
    self.assertGreater(len(np.unique(one['tokens'])), 5)
    self.assertEqual(one['tokens'][3].max(), 0)
    said = exported()[2]
    self.assertIn('on 8 devices', said[1])
    self.assertNotIn('devices', said[0])

  def test_parameters_are_spread_by_the_rules_of_the_family(self):
    module, _ = small_talkers.build('t5x')
    specs = models.family_of(module).specs()
    mesh = partition.make_mesh(data=4, model=2)
    manifest, laid = load_as_documented(exported()[1])
    self.assertEqual(manifest['devices'], 8)
    self.assertEqual(manifest['inputs']['shape'], ['4*batch', WIDTH])
    spread = 0
    for name, leaf in laid['params'].items():
      spec = specs[name]
      wanted = partition.sharding(
        mesh, spec.axes, spec.shape, partition.standard().params
      )
      self.assertEqual(leaf.sharding, wanted, name)
      spread += not leaf.sharding.is_fully_replicated
    self.assertGreater(spread, 10)
    self.assertLen(laid['inputs'].addressable_shards, 8)
    self.assertEqual(laid['inputs'].addressable_shards[0].data.shape[0], 2)

  def test_another_number_of_devices(self):
    one, eight, _ = exported()
    for devices in (1, 4):
      with self.assertRaisesRegex(
        errors.ConfigError, f'for 8 devices, and there .* {devices}: '
      ):
        served_lib.open_exported(eight, jax.devices()[:devices])
    with self.assertRaisesRegex(errors.ConfigError, 'for 1 device, and'):
      served_lib.open_exported(one, jax.devices()[:2])
    with mock.patch.object(jax, 'devices', lambda: jax.local_devices()[:2]):
      with self.assertRaisesRegex(errors.ConfigError, 'there are 2'):
        served_lib.open_exported(eight)

  def test_a_device_of_choice(self):
    device = jax.devices()[5]
    served = served_lib.open_exported(exported()[0], [device])
    leaves = jax.tree.leaves(served._params)
    self.assertTrue(all(leaf.devices() == {device} for leaf in leaves))

  def test_batches_that_do_not_fit(self):
    eight = opened()[1]
    for wrong in (inputs(6), inputs()[:, :4], inputs()[0]):
      with self.assertRaisesRegex(errors.DataError, 'a multiple of 4'):
        eight(wrong, SEED)
    with self.assertRaisesRegex(errors.ConfigError, 'give a seed'):
      eight(inputs())
    module, params = small_talkers.build('t5x')
    out = pathlib.Path(self.create_tempdir().full_path) / 'out'
    export = functools.partial(
      serving.export_decoder, module, params, out,
      input_length=WIDTH, length=2, platforms=['tpu'],
    )  # fmt: skip
    with self.assertRaisesRegex(errors.ConfigError, 'does not divide over the'):
      export(batch_size=6, mesh=partition.abstract_mesh(data=4))
    with self.assertRaisesRegex(errors.ConfigError, 'no branch'):
      export(mesh=partition.abstract_mesh(branch=2))
    self.assertFalse(out.exists())
    export(batch_size=2)
    with self.assertRaisesRegex(errors.ConfigError, 'these devices are cpu'):
      served_lib.open_exported(out)

  def test_folders_that_are_something_else(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.CheckpointError, 'is not what'):
      served_lib.open_exported(folder)
    copy = folder / 'copy'
    shutil.copytree(exported()[0], copy)
    manifest = json.loads((copy / serving.MANIFEST).read_text())
    (copy / serving.PROGRAM).write_bytes(b'other')
    with self.assertRaisesRegex(errors.CheckpointError, 'changed since'):
      served_lib.open_exported(copy)
    manifest['mergejax_export'] = 0
    (copy / serving.MANIFEST).write_text(json.dumps(manifest))
    with self.assertRaisesRegex(errors.CheckpointError, 'has version 0'):
      served_lib.open_exported(copy)

  def test_meshes_that_are_not_sizes(self):
    for mesh, said in (
      ('rows=2', "Unknown mesh axis 'rows'"),
      ('data', 'a whole number'),
      ('data=0', 'Mesh axis data must be'),
    ):
      code, told = command('export', 'none', 'out', '--mesh', mesh)
      self.assertEqual(code, 2)
      self.assertIn(said, told)


def load_as_documented(folder):
  """Runs what docs/serving.md tells a server of several devices."""
  parts = (ROOT / 'docs' / 'serving.md').read_text().split('```python\n')[1:]
  one, several, *_ = [part.partition('```')[0] for part in parts]
  one = one.partition('inputs = ')[0].replace("'served'", repr(str(folder)))
  names = {}
  exec(one, names)  # pylint: disable=exec-used
  names['inputs'] = inputs()
  several = several.partition('found = ')[0]
  exec(several, names)  # pylint: disable=exec-used
  return names['manifest'], names


if __name__ == '__main__':
  absltest.main()
