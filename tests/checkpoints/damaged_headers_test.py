# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Damaged safetensors files: one message or the right numbers, nothing else."""

import json
import pathlib
import struct
import tempfile
import tracemalloc

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import numpy as np
import safetensors.numpy

import mergejax as mj
from mergejax.core import tree as tree_lib

LEAVES = {
  'a': np.arange(12, dtype=np.float32).reshape(3, 4),
  'b.weight': np.arange(6, dtype=np.int16),
  'c': np.ones((2, 2), np.float64),
}
GOOD = safetensors.numpy.save(LEAVES)
HEADER = struct.unpack('<Q', GOOD[:8])[0]


def with_header(header: bytes, body: bytes = GOOD[8 + HEADER :]) -> bytes:
  return struct.pack('<Q', len(header)) + header + body


def check(data: bytes):
  """Opens and reads a file; any trouble must be a `UserError`."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'x.safetensors'
    path.write_bytes(data)
    tracemalloc.start()
    try:
      store = mj.open_checkpoint(path)
      specs = store.specs()
      assert sum(spec.nbytes for spec in specs.values()) <= len(data)
      store.read()
      for name, spec in specs.items():
        store.read_into(name, 0, np.empty(spec.size, spec.dtype))
      return specs
    except mj.UserError:
      return None
    finally:
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
      # The messages and the JSON library need some; no claimed size does.
      assert peak < 20 * len(data) + 2**20, peak


class DamagedHeadersTest(parameterized.TestCase):
  def test_undamaged(self):
    self.assertCountEqual(check(GOOD), LEAVES)

  @hypothesis.settings(
    max_examples=300, deadline=None, database=None, derandomize=True
  )
  @hypothesis.given(st.data())
  def test_mutated_bytes(self, data):
    header = bytearray(GOOD[8 : 8 + HEADER])
    for _ in range(data.draw(st.integers(1, 4))):
      at = data.draw(st.integers(0, len(header) - 1))
      kind = data.draw(st.sampled_from(['change', 'insert', 'delete']))
      byte = data.draw(st.integers(0, 255))
      if kind == 'change':
        header[at] = byte
      elif kind == 'insert':
        header.insert(at, byte)
      elif len(header) > 1:
        del header[at]
    length = data.draw(
      st.sampled_from([len(header)] * 3 + [0, 7, 2**63, 2**31])
    )
    check(struct.pack('<Q', length) + bytes(header) + GOOD[8 + HEADER :])

  @hypothesis.settings(
    max_examples=100, deadline=None, database=None, derandomize=True
  )
  @hypothesis.given(
    st.lists(st.integers(-5, 200), min_size=2, max_size=2),
    st.lists(st.integers(-1, 2**40), max_size=3),
    st.sampled_from(['F32', 'F64', 'I8', 'BF16', 'F99', 'BOOL']),
  )
  def test_offsets_shapes_and_dtypes_that_do_not_fit(
    self, offsets, shape, dtype
  ):
    header = json.loads(GOOD[8 : 8 + HEADER])
    header['a'] = {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}
    check(with_header(json.dumps(header).encode()))

  @parameterized.parameters(
    ([0, 48], [40, 88]),  # overlapping
    ([0, 48], [1000, 1048]),  # out of range
    ([0, 48], [60, 108]),  # a gap
    ([48, 0], [48, 96]),  # backwards
  )
  def test_overlapping_and_out_of_range_offsets_are_refused(
    self, first, second
  ):
    entry = lambda at: {'dtype': 'F32', 'shape': [12], 'data_offsets': at}
    header = json.dumps({'a': entry(first), 'b': entry(second)}).encode()
    self.assertIsNone(check(with_header(header, bytes(96))))

  def test_a_file_that_shrinks_while_it_is_read(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'x.safetensors'
    path.write_bytes(GOOD)
    store = mj.open_checkpoint(path)
    path.write_bytes(GOOD[:-8])
    with self.assertRaisesRegex(mj.UserError, 'became shorter'):
      for name, spec in store.specs().items():
        store.read_into(name, 0, np.empty(spec.size, spec.dtype))

  def test_pieces_are_the_same_as_the_whole(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ('x.safetensors', 'x.npz', 'x'):
      mj.save_checkpoint(folder / name, LEAVES)
      store = mj.open_checkpoint(folder / name)
      whole = tree_lib.flatten(store.read())
      for path, leaf in whole.items():
        for start, count in ((0, leaf.size), (1, 2), (leaf.size - 1, 1)):
          out = np.empty(count, leaf.dtype)
          store.read_into(path, start, out)
          np.testing.assert_array_equal(
            out, np.asarray(leaf).reshape(-1)[start : start + count]
          )


if __name__ == '__main__':
  absltest.main()
