# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every dtype comes back bit for bit from every format, or is refused."""

import json
import pathlib
import struct

from absl.testing import absltest
from absl.testing import parameterized
import jax
import ml_dtypes
import numpy as np

import mergejax as mj

FORMATS = {'orbax': '', 'safetensors': '.safetensors', 'npz': '.npz', 't5x': ''}
# What safetensors, and the arrays of zarr, have no name for.
LACK = {
  'int4': ('safetensors',),
  'float4_e2m1fn': ('safetensors',),
  'float6_e2m3fn': ('safetensors', 'orbax', 't5x'),
  'complex64': ('safetensors',),
}


class DtypesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.product(
    form=list(FORMATS),
    dtype=(
      'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e8m0fnu', 'int4',
      'float4_e2m1fn', 'float6_e2m3fn', 'bool', 'complex64', '>f4',
    ),
  )  # fmt: skip
  def test_round_trip(self, form, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    leaf = np.array([[1, 0.5, 2], [1, 1, 4]], np.float32).astype(kind)
    tree = {'a': {'w': leaf, 'scalar': leaf[0, 0]}}
    path = self.folder / f'x{FORMATS[form]}'
    if form in LACK.get(dtype, ()):
      with self.assertRaisesRegex(mj.UserError, rf'a/(w|scalar) is {dtype}'):
        mj.save_checkpoint(path, tree, form)
      self.assertEqual(list(self.folder.iterdir()), [])
      return
    mj.save_checkpoint(path, tree, form)
    store = mj.open_checkpoint(path)
    native = leaf.astype(kind.newbyteorder('='))
    back = store.read()['a']
    self.assertEqual(store.specs()['a/w'].dtype, native.dtype)
    self.assertEqual(back['w'].dtype, native.dtype)
    self.assertEqual(back['w'].tobytes(), native.tobytes())
    self.assertEqual(back['scalar'].tobytes(), native[:1, :1].tobytes())
    self.assertEqual(back['scalar'].shape, ())

  @parameterized.parameters(*FORMATS)
  def test_a_random_key_is_refused_by_its_path(self, form):
    path = self.folder / f'x{FORMATS[form]}'
    with self.assertRaisesRegex(mj.UserError, 'state/key: .*key_data'):
      mj.save_checkpoint(path, {'state': {'key': jax.random.key(0)}}, form)
    self.assertEqual(list(self.folder.iterdir()), [])

  def test_a_random_key_is_not_merged(self):
    models = [{'w': np.ones(2), 'key': jax.random.key(0)}] * 2
    with self.assertRaisesRegex(mj.UserError, 'key: .*key_data'):
      mj.merge(models, 'linear')

  def test_nameless_bytes_of_numpy(self):
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    np.savez(self.folder / 'a.npz', w=half)
    read = mj.open_checkpoint(self.folder / 'a.npz').read()['w']
    self.assertEqual(read.dtype, half.dtype)
    np.testing.assert_array_equal(read, half)
    np.savez(self.folder / 'b.npz', w=half.astype(ml_dtypes.float8_e4m3fn))
    with self.assertRaisesRegex(mj.UserError, 'does not say what they mean'):
      mj.open_checkpoint(self.folder / 'b.npz')

  @parameterized.parameters(
    ('C64', 32), ('F4', 2), ('F6_E2M3', 3), ('I4', 2), ('F128', 64)
  )
  def test_a_dtype_of_others_is_not_called_damage(self, dtype, size):
    entry = {'dtype': dtype, 'shape': [4], 'data_offsets': [0, size]}
    header = json.dumps({'freqs': entry}).encode()
    path = self.folder / 'model.safetensors'
    path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(size))
    with self.assertRaises(mj.UserError) as caught:
      mj.open_checkpoint(path)
    self.assertIn(f'dtype {dtype} is not supported', str(caught.exception))
    self.assertNotRegex(str(caught.exception), '[Dd]amaged|ownload')


if __name__ == '__main__':
  absltest.main()
