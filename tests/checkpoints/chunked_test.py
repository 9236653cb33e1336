# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written chunk by chunk, and read by rows and slices."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

import mergejax as mj
from mergejax.checkpoints import chunked
from mergejax.core import tree as tree_lib


class ChunkedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.leaves = {
      'a/kernel': rng.normal(size=(10, 3, 4)).astype(np.float32),
      'a/scale': rng.normal(size=(70,)).astype(ml_dtypes.bfloat16),
      'count': np.arange(5),
      'none': np.zeros((0, 3), np.float32),
      'temperature': np.float32(2).reshape(()),
    }
    self.path = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint'

  def write(self, form, limit=100):
    """Every chunk by one of two writers, the last ones first."""
    specs = tree_lib.specs(self.leaves)
    with mock.patch.object(chunked, 'CHUNK', limit):
      writers = [chunked.Writer(self.path, form, specs) for _ in range(2)]
      writers[0].create()
      chunks = writers[0].chunks()
      for k, chunk in reversed(list(enumerate(chunks))):
        flat = self.leaves[chunk.path].reshape(-1)
        numbers = flat[chunk.start : chunk.start + chunk.size]
        writers[k % 2].write(chunk, numbers)
      with self.assertRaisesRegex(mj.UserError, 'not a checkpoint'):
        mj.open_checkpoint(self.path)
      writers[0].finish()
    return chunks

  @parameterized.parameters(*chunked.FORMATS)
  def test_what_is_written_is_read(self, form):
    chunks = self.write(form)
    self.assertLen([c for c in chunks if c.path == 'a/kernel'], 5)
    store = mj.open_checkpoint(self.path)
    self.assertEqual(store.provenance['format'], form)
    self.assertEqual(store.specs(), tree_lib.specs(self.leaves))
    for path, leaf in tree_lib.flatten(store.read()).items():
      self.assertEqual(leaf.tobytes(), self.leaves[path].tobytes(), path)

  def test_orbax_restores_it(self):
    self.write('orbax')
    found = tree_lib.flatten(ocp.PyTreeCheckpointer().restore(self.path))
    for path, leaf in self.leaves.items():
      self.assertEqual(np.asarray(found[path]).tobytes(), leaf.tobytes(), path)

  @parameterized.parameters(*chunked.FORMATS)
  def test_stretches_and_slices_cost_their_rows(self, form):
    self.write(form)
    store = mj.open_checkpoint(self.path)
    self.assertEqual(store.window_bytes('a/kernel'), 2 * 3 * 4 * 4)
    self.assertEqual(store.window_bytes('count'), 5 * 8)
    self.assertTrue(store.has_slices('a/kernel', 0))
    self.assertFalse(store.has_slices('a/kernel', 1))
    rows, whole = [], store._read_array

    def read(path, where):
      rows.append(where)
      return whole(path, where)

    flat = self.leaves['a/kernel'].reshape(-1)
    with mock.patch.object(store, '_read_array', read):
      for start, stop in ((30, 50), (50, 72), (0, 120), (119, 120)):
        out = np.empty(stop - start, np.float32)
        store.read_into('a/kernel', start, out)
        self.assertEqual(out.tobytes(), flat[start:stop].tobytes())
    # Rows that follow each other are read once.
    starts = [where.start for where in rows]
    self.assertEqual(starts, [2, 4, 0, 2, 4, 6, 8])
    for axis in (0, 1, 2):
      found = store.read_slices('a/kernel', axis, 1, 3)
      where = (*[slice(None)] * axis, slice(1, 3))
      self.assertEqual(
        found.tobytes(), self.leaves['a/kernel'][where].tobytes()
      )
    for path in ('a/scale', 'count', 'temperature'):
      out = np.empty(1, self.leaves[path].dtype)
      store.read_into(path, 0, out)
      self.assertEqual(out[0], self.leaves[path].reshape(-1)[0])

  def test_slices_of_safetensors(self):
    path = self.path.with_suffix('.safetensors')
    mj.save_checkpoint(path, self.leaves)
    store = mj.open_checkpoint(path)
    for axis in (0, 1, 2):
      found = store.read_slices('a/kernel', axis, 1, 3)
      where = (*[slice(None)] * axis, slice(1, 3))
      self.assertEqual(
        found.tobytes(), self.leaves['a/kernel'][where].tobytes()
      )

  def test_a_damaged_chunk_is_told(self):
    self.write('orbax')
    (self.path / 'a.kernel' / '2.0.0').write_bytes(b'torn')
    store = mj.open_checkpoint(self.path)
    with self.assertRaisesRegex(mj.UserError, 'a/kernel cannot be read'):
      store.read_into('a/kernel', 50, np.empty(1, np.float32))


if __name__ == '__main__':
  absltest.main()
