# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Formats round-trip bit for bit; damage is told, and never half-written."""

import json
import pathlib
import pickle
import resource
import struct
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

import mergejax as mj
from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import safetensors as st_store
from mergejax.core import tree
from mergejax.nn import lm
from mergejax.nn import t5


def example():
  rng = np.random.default_rng(0)
  return {
    'a': {
      'kernel': rng.normal(size=(3, 5)).astype(np.float32),
      'half': rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
    },
    'step': np.int32(3),
  }


def same(test, actual, expected):
  actual, expected = tree.flatten(actual), tree.flatten(expected)
  test.assertEqual(sorted(actual), sorted(expected))
  for path, leaf in expected.items():
    test.assertEqual(actual[path].dtype, leaf.dtype, path)
    np.testing.assert_array_equal(actual[path], leaf)


NAMES = (
  ('orbax', 'ck', 'orbax'),
  ('safetensors_file', 'ck.safetensors', None),
  ('safetensors_folder', 'ck', 'safetensors'),
  ('npz', 'ck.npz', None),
)


class RoundTripTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.named_parameters(*NAMES)
  def test_round_trip(self, name, form):
    path = self.folder / name
    mj.save_checkpoint(path, example(), format=form)
    store = mj.open_checkpoint(path)
    self.assertEqual(sorted(store.specs()), ['a/half', 'a/kernel', 'step'])
    self.assertEqual(store.specs()['a/half'].dtype, ml_dtypes.bfloat16)
    self.assertEqual(store.specs()['a/kernel'].shape, (3, 5))
    same(self, store.read(), example())
    same(self, store.read(['a/half']), {'a': {'half': example()['a']['half']}})
    wide = store.read(dtype=np.float32)
    self.assertEqual(wide['a']['half'].dtype, np.float32)
    self.assertEqual(wide['step'].dtype, np.int32)
    with self.assertRaisesRegex(mj.UserError, "Did you mean 'a/kernel'"):
      store.read(['a/kernl'])

  @parameterized.named_parameters(*NAMES)
  def test_overwriting_is_asked_for_and_whole(self, name, form):
    path = self.folder / name
    mj.save_checkpoint(path, {'w': np.zeros(2)}, format=form)
    with self.assertRaisesRegex(mj.UserError, 'already exists'):
      mj.save_checkpoint(path, example(), format=form)
    mj.save_checkpoint(path, example(), format=form, overwrite=True)
    same(self, mj.open_checkpoint(path).read(), example())
    self.assertEqual([p.name for p in self.folder.iterdir()], [name])

  def test_sharded_folder(self):
    path = self.folder / 'model'
    mj.save_checkpoint(
      path, example(), format='safetensors', max_shard_bytes=20
    )
    self.assertLen(list(path.glob('*.safetensors')), 3)
    same(self, mj.open_checkpoint(path).read(), example())
    index = json.loads((path / 'model.safetensors.index.json').read_text())
    self.assertEqual(index['metadata']['total_size'], 60 + 8 + 4)
    next(iter(path.glob('*-of-*'))).unlink()
    with self.assertRaisesRegex(mj.UserError, 'missing'):
      mj.open_checkpoint(path)

  def test_read_onto_a_mesh(self):
    mesh = mj.make_mesh(data=8)
    target = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('data')
    )
    mj.save_checkpoint(self.folder / 'ck', {'w': np.arange(16.0)})
    leaf = mj.open_checkpoint(self.folder / 'ck').read(sharding=target)['w']
    self.assertTrue(leaf.sharding.is_equivalent_to(target, 1))

  def test_the_last_step_of_a_run_is_meant(self):
    for step in (2, 10):
      state = {
        'params': {'w': np.full(2, step)},
        'opt_state': {'m': np.ones(1)},
      }
      mj.save_checkpoint(self.folder / 'run' / str(step) / 'state', state)
    store = mj.open_checkpoint(self.folder / 'run')
    self.assertEqual(list(store.specs()), ['w'])
    np.testing.assert_array_equal(store.read()['w'], [10, 10])

  @parameterized.parameters('lm', 't5x')
  def test_load_model(self, kind):
    module = (
        lm.LanguageModel(lm.LMConfig(emb_dim=8, num_heads=2, head_dim=4,
                                     num_layers=1, mlp_dim=16))
        if kind == 'lm'
        else t5.Transformer(t5.T5Config(vocab_size=32, emb_dim=8, num_heads=2,
                                        head_dim=4, num_encoder_layers=1,
                                        num_decoder_layers=1, mlp_dim=16))
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    path = self.folder / 'model'
    mj.save_checkpoint(path, params, config=models.describe(module))
    loaded, restored = mj.load_model(path)
    self.assertEqual(loaded, module)
    same(self, restored, params)
    broken = tree.flatten(params)
    broken.popitem()
    mj.save_checkpoint(
      path, broken, config=models.describe(module), overwrite=True
    )
    with self.assertRaisesRegex(mj.UserError, r'- .*token_embedder'):
      mj.load_model(path)


class DamageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.file = self.folder / 'x.safetensors'
    safetensors.numpy.save_file(
      {'w': np.arange(8, dtype=np.float32)}, self.file
    )

  def refused(self, message):
    with self.assertRaisesRegex(mj.UserError, message):
      mj.open_checkpoint(self.file).read()

  def test_truncated(self):
    whole = self.file.read_bytes()
    for size in (0, 4, 20, len(whole) - 1):
      self.file.write_bytes(whole[:size])
      self.refused('x.safetensors')

  def test_oversized_header(self):
    whole = self.file.read_bytes()
    self.file.write_bytes(struct.pack('<Q', 10**15) + whole[8:])
    self.refused('claims 1000000000000000 bytes')

  def test_header_is_not_json(self):
    whole = self.file.read_bytes()
    self.file.write_bytes(whole[:8] + b'?' * 10 + whole[18:])
    self.refused('damaged')

  def test_offsets_out_of_range(self):
    header = json.dumps(
      {'w': {'dtype': 'F32', 'shape': [8], 'data_offsets': [0, 320]}}
    ).encode()
    self.file.write_bytes(struct.pack('<Q', len(header)) + header + bytes(32))
    self.refused('damaged')

  @settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=list(HealthCheck),
  )
  @given(st.data())
  def test_mutated_headers_never_crash(self, data):
    whole = bytearray(
      struct.pack('<Q', 59)
      + b'{"w":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}    '
      + bytes(32)
    )
    for _ in range(data.draw(st.integers(1, 4))):
      at = data.draw(st.integers(0, 66))
      whole[at] = data.draw(st.integers(0, 255))
    self.file.write_bytes(whole)
    try:
      mj.open_checkpoint(self.file).read()
    except mj.UserError as error:
      self.assertIn('safetensors', str(error))

  def test_missing_names_what_is_there(self):
    with self.assertRaisesRegex(mj.UserError, 'holds: x.safetensors'):
      mj.open_checkpoint(self.folder / 'y.safetensors')

  def test_pickles_are_refused(self):
    (self.folder / 'old').mkdir()
    (self.folder / 'old' / 'pytorch_model.bin').write_bytes(pickle.dumps({}))
    with self.assertRaisesRegex(mj.UserError, 'pickle'):
      mj.open_checkpoint(self.folder / 'old')
    np.savez(self.folder / 'o.npz', w=np.array([{}], object))
    with self.assertRaisesRegex(mj.UserError, 'pickle'):
      mj.open_checkpoint(self.folder / 'o.npz')

  def test_cut_short_orbax_is_refused(self):
    path = self.folder / 'ck'
    mj.save_checkpoint(path, {'w': np.ones(4)})
    metadata = path / '_METADATA'
    metadata.write_text(metadata.read_text()[:40])
    with self.assertRaisesRegex(mj.UserError, 'damaged'):
      mj.open_checkpoint(path)

  def test_unknown_format(self):
    with self.assertRaisesRegex(mj.UserError, "Did you mean 'safetensors'"):
      mj.save_checkpoint(self.folder / 'z', {'w': np.ones(1)}, 'safetensor')

  def test_wrong_hugging_face_shard_is_refused(self):
    index = {'weight_map': {'w': '../x.safetensors'}}
    (self.folder / 'hf').mkdir()
    (self.folder / 'hf' / 'model.safetensors.index.json').write_text(
      json.dumps(index)
    )
    with self.assertRaisesRegex(mj.UserError, 'outside'):
      st_store.SafetensorsStore(self.folder / 'hf')


_FULL_DISK = """
import resource, sys, numpy as np, mergejax as mj
path, form = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
rng = np.random.default_rng(0)
try:
  mj.save_checkpoint(
      path, {'w': rng.normal(size=200_000)}, format=form, overwrite=True)
except mj.UserError as error:
  print(error)
  sys.exit(2)
"""


class FullDiskTest(parameterized.TestCase):
  """A file-size limit stands in for a full disk: writes fail half-way."""

  @parameterized.named_parameters(*NAMES)
  def test_the_previous_checkpoint_survives(self, name, form):
    self.assertTrue(hasattr(resource, 'RLIMIT_FSIZE'))
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / name
    mj.save_checkpoint(path, example(), format=form)
    done = subprocess.run(
      [sys.executable, '-c', _FULL_DISK, path, form or path.suffix[1:]],
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 2, done.stderr)
    self.assertIn('Could not write', done.stdout)
    same(self, mj.open_checkpoint(path).read(), example())
    self.assertEqual([p.name for p in folder.iterdir()], [name])


class ConfigTest(absltest.TestCase):
  def test_settings_are_checked(self):
    with self.assertRaisesRegex(mj.UserError, "Did you mean 'emb_dim'"):
      models.build({'model_type': 'lm', 'embdim': 8})
    with self.assertRaisesRegex(mj.UserError, 'model_type'):
      models.build({'model_type': 'llm'})
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'config.json').write_text('[')
    with self.assertRaisesRegex(mj.UserError, 'not JSON'):
      checkpoint.read_config(folder)


if __name__ == '__main__':
  absltest.main()
