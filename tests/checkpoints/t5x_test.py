# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5X's checkpoints, written by T5X: read bit for bit, and written alike."""

import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import flax.serialization
import goldens
import numpy as np

import mergejax as mj
from mergejax.core import tree as tree_lib

FOLDER = goldens.FOLDER / 't5x_tiny_complete'


def expected():
  with np.load(FOLDER / 'expected.npz') as archive:
    return {
      name.removeprefix('target/'): archive[name]
      for name in archive.files
      if name.startswith('target/')
    }


def files(folder: pathlib.Path) -> list[str]:
  return sorted(
    str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file()
  )


class T5xTest(parameterized.TestCase):
  @parameterized.parameters(
    't5x_legacy', 't5x_legacy/checkpoint_3', 't5x_legacy/checkpoint_3/checkpoint',
    'orbax', 'orbax/checkpoint_3', 'orbax/checkpoint_3/state',
  )  # fmt: skip
  def test_reads_what_t5x_wrote(self, name):
    store = mj.open_checkpoint(FOLDER / name)
    leaves = tree_lib.flatten(store.read())
    want = expected()
    self.assertCountEqual(leaves, want)
    for path, leaf in want.items():
      np.testing.assert_array_equal(leaves[path], leaf, path)
      self.assertEqual(store.specs()[path].shape, leaf.shape)

  def test_bfloat16(self):
    store = mj.open_checkpoint(FOLDER / 't5x_legacy_bf16')
    leaves = tree_lib.flatten(store.read())
    self.assertEqual({*leaves}, {*expected()})
    for path, leaf in leaves.items():
      self.assertEqual(leaf.dtype.name, 'bfloat16')
      np.testing.assert_array_equal(leaf, expected()[path].astype(leaf.dtype))

  def test_running_averages_are_opened_with_the_parameters(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint_3'
    mj.save_checkpoint(path, {'w': np.ones(2, np.float32)}, 't5x')
    file = path / 'checkpoint'
    data = flax.serialization.msgpack_restore(file.read_bytes())
    self.assertNotIn('left_out', mj.open_checkpoint(path).provenance)
    data['optimizer']['flax_mutables'] = {
      'batch_stats': {'bn': {'mean': np.full(3, 7.0, np.float32)}},
      'cache': {'index': np.int32(1)},
    }
    data['optimizer']['state']['param_states'] = {'w': {'v': np.ones(2)}}
    file.write_bytes(flax.serialization.msgpack_serialize(data))
    store = mj.open_checkpoint(path)
    leaves = tree_lib.flatten(store.read())
    self.assertEqual(sorted(leaves), ['batch_stats/bn/mean', 'w'])
    np.testing.assert_array_equal(leaves['batch_stats/bn/mean'], [7, 7, 7])
    self.assertEqual(store.provenance['left_out'], ['state', 'cache'])

  @parameterized.parameters('t5x_legacy', 't5x_legacy_bf16')
  def test_writes_the_same_files_and_keys(self, name):
    source = FOLDER / name / 'checkpoint_3'
    out = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint_3'
    leaves = tree_lib.flatten(mj.open_checkpoint(source).read())
    mj.save_checkpoint(out, leaves, 't5x')
    theirs = [f for f in files(source) if not f.startswith('state.')]
    self.assertEqual(files(out), theirs)
    for file in theirs:
      if file.endswith('.zarray'):
        self.assertEqual((out / file).read_text(), (source / file).read_text())
    trees = [
      flax.serialization.msgpack_restore((f / 'checkpoint').read_bytes())
      for f in (source, out)
    ]
    for key in (lambda t: t['version'], lambda t: t['optimizer']['target']):
      self.assertEqual(key(trees[0]), key(trees[1]))
    self.assertEqual(*(set(t['optimizer']['state']) for t in trees))
    self.assertEqual(*(t['optimizer']['state']['step'] for t in trees))
    again = tree_lib.flatten(mj.open_checkpoint(out.parent).read())
    for path, leaf in leaves.items():
      self.assertEqual(np.asarray(again[path]).tobytes(), leaf.tobytes())

  def test_everything_inline_in_one_file(self):
    file = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint_0'
    target = tree_lib.unflatten(expected())
    data = {'version': 3, 'optimizer': {'target': target, 'state': {}}}
    file.write_bytes(flax.serialization.msgpack_serialize(data))
    leaves = tree_lib.flatten(mj.open_checkpoint(file).read())
    for path, leaf in expected().items():
      np.testing.assert_array_equal(leaves[path], leaf)

  def copy(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint_3'
    shutil.copytree(FOLDER / 't5x_legacy' / 'checkpoint_3', folder)
    return folder

  def test_a_lost_zarray_is_made_up_from_the_tree(self):
    folder = self.copy()
    (folder / 'target.token_embedder.embedding' / '.zarray').unlink()
    leaf = mj.open_checkpoint(folder).read(['token_embedder/embedding'])
    np.testing.assert_array_equal(
      leaf['token_embedder']['embedding'],
      expected()['token_embedder/embedding'],
    )

  def test_mistakes(self):
    folder = self.copy()
    shutil.rmtree(folder / 'target.token_embedder.embedding')
    with self.assertRaisesRegex(
      mj.UserError, 'token_embedder/embedding is miss'
    ):
      mj.open_checkpoint(folder).read()
    data = (folder / 'checkpoint').read_bytes()
    (folder / 'checkpoint').write_bytes(data[: len(data) // 2])
    with self.assertRaisesRegex(mj.UserError, 'damaged or was cut short'):
      mj.open_checkpoint(folder)

    def saved(**changes):
      tree = {
        'version': 3,
        'optimizer': {'target': {'w': np.zeros(2)}, 'state': {}},
      }
      (folder / 'checkpoint').write_bytes(
        flax.serialization.msgpack_serialize({**tree, **changes})
      )
      return mj.open_checkpoint(folder)

    with self.assertRaisesRegex(mj.UserError, 'version 1'):
      saved(version=1)
    with self.assertRaisesRegex(mj.UserError, 'no parameters'):
      saved(optimizer={'target': {}, 'state': {'step': np.zeros(1)}})
    entry = {
      'driver': 'zarr', 'dtype': 'float32',
      'kvstore': {'driver': 'file', 'path': '../../etc'},
      'metadata': {'shape': [2], 'chunks': [2]},
    }  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, 'outside of its folder'):
      saved(optimizer={'target': {'w': entry}, 'state': {}}).read()
    (folder / 'checkpoint').write_bytes(b'model_checkpoint_path: "x"')
    with self.assertRaisesRegex(mj.UserError, 'TensorFlow checkpoint'):
      mj.open_checkpoint(folder)


if __name__ == '__main__':
  absltest.main()
