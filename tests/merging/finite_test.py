# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite are refused in memory as they are on disk."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import laws
import ml_dtypes
import numpy as np

import mergejax as mj
from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.merging import finite
from mergejax.merging import on_mesh
from mergejax.methods import mean
from mergejax.methods import named
from mergejax.methods import ties


def full(value, dtype=np.float32):
  return {'w': np.full((2, 4), value, dtype), 'b': np.ones(2, dtype)}


class InputsTest(parameterized.TestCase):
  @parameterized.parameters(
    np.float16, ml_dtypes.bfloat16, np.float32, np.float64,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
  )  # fmt: skip
  def test_every_dtype(self, dtype):
    good, bad = full(1, dtype), full(1, dtype)
    bad['w'][1, 1:3] = np.nan
    self.assertIsNone(finite.first_bad([good['w'], jnp.ones(2)]))
    for array in (bad['w'], jnp.asarray(bad['w'])):
      self.assertEqual(finite.first_bad([good['w'], array]), (1, 2))
    with self.assertRaisesRegex(
      mj.UserError, r'model 1: w has 2 number\(s\) that are not finite, of 8'
    ):
      mj.merge([good, bad], 'ties', base=good)

  @parameterized.named_parameters(laws.ALL)
  def test_numbers_that_are_not_finite_are_refused(self, row):
    method = named.resolve(row.name, **row.options)
    with_base = row.base or method.base == 'required'
    for where in (row.models, 0) if with_base else (row.models,):
      base, *models = copies = laws.make(row.models + 1)
      copies[where]['a/bias'][1:] = [np.nan, -np.inf]
      name = f'model {row.models - 1}' if where else 'the base'
      for give in (np.asarray, jnp.asarray):
        with self.assertRaisesRegex(
          mj.UserError, f'{name}: a/bias has 2 number.* not finite, of 3'
        ):
          laws.run(
            row,
            [jax.tree.map(give, m) for m in models],
            jax.tree.map(give, base),
            stats=laws.make_stats(row, models),
          )

  def test_large_numbers_are_finite(self):
    for array in (np.full(8, 3e38, np.float32), np.full(8, 6e4, np.float16)):
      self.assertTrue(finite.all_finite(array))
      opposite = np.concatenate([array, -array])
      self.assertTrue(finite.all_finite(opposite))
      opposite[[0, -1]] = np.inf, -np.inf
      self.assertFalse(finite.all_finite(opposite))

  def test_a_base_that_plays_no_part_is_not_looked_at(self):
    bad = full(np.nan)
    merged = mj.merge([full(1), full(3)], 'linear', base=bad)
    np.testing.assert_array_equal(merged['w'], full(2)['w'])
    with self.assertRaisesRegex(mj.UserError, 'the base: w has 8'):
      mj.merge([full(1)], 'sce', base=bad)

  def test_a_copied_leaf(self):
    bad = full(np.inf)
    with self.assertRaisesRegex(mj.UserError, 'the base: w has 8'):
      mj.merge([full(1)], 'ties', base=bad, rules=[('w', 'copy')])
    # The model's own leaf is not used, so that a rule is a way out.
    merged = mj.merge([bad], 'ties', base=full(1), rules=[('w', 'copy')])
    np.testing.assert_array_equal(merged['w'], full(1)['w'])

  @parameterized.parameters('fisher', 'gram')
  def test_statistics(self, kind):
    trees = [{'kernel': np.ones((3, 2), np.float32)}] * 2
    shape = (3, 2) if kind == 'fisher' else (3, 3)
    for where, value in (((0, 1), np.inf), ((1, 0), np.nan)):
      stats = [{'kernel': {kind: np.ones(shape, np.float32)}} for _ in trees]
      stats[1]['kernel'][kind][where] = value
      method = {'fisher': 'fisher', 'gram': 'regmean'}[kind]
      with self.assertRaisesRegex(
        mj.UserError, f'kernel: the {kind} of model 1 has .*not finite'
      ):
        mj.merge(trees, method, stats=stats)

  def test_sharded_leaves_are_not_gathered(self):
    mesh = partition.make_mesh(data=8)
    layout = partition.sharding(mesh, ('batch', None))
    array = np.ones((16, 4), np.float32)
    array[3, 2] = np.nan
    placed = jax.device_put(array, layout)
    self.assertEqual(finite.first_bad([placed]), (0, 1))
    text = finite._are_finite.lower([placed]).compile().as_text()
    self.assertIn('all-reduce', text)
    self.assertNotIn('all-gather', text)

  def test_experts_side_by_side(self):
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *[full(1)] * 3)
    stacked['w'][2, 0, 0] = np.nan
    for method in (mean.linear(), ties.ties()):
      with self.assertRaisesRegex(mj.UserError, 'model 2: w has 1 .*, of 8'):
        on_mesh.merge_experts(stacked, method, base=full(0))

  def test_what_jit_traces_goes_through(self):
    merge = jax.jit(lambda m: mj.merge([m, full(1)], 'linear')['w'])
    self.assertTrue(np.all(np.isnan(merge(full(np.nan)))))
    with self.assertRaisesRegex(mj.UserError, 'model 1: w'):
      jax.jit(lambda m: mj.merge([m, full(np.nan)], 'linear'))(full(1))

  def test_a_store_is_read_once(self):
    store = store_base.MemoryStore(full(1), 'a')
    with mock.patch.object(store, 'leaves', wraps=store.leaves) as read:
      mj.merge([store, full(3)], 'linear')
    self.assertEqual(read.call_count, 2)  # one call a leaf


class ResultsTest(parameterized.TestCase):
  @parameterized.parameters(
    (np.float16, 4e4, 65504),
    (ml_dtypes.float8_e4m3fn, 300, 448),
    (ml_dtypes.float8_e5m2, 4e4, 57344),
  )
  def test_the_dtype_of_the_models(self, dtype, value, largest):
    model = full(value, dtype)
    merged = mj.merge([model, model], 'linear')  # the mean fits
    np.testing.assert_array_equal(
      np.asarray(merged['w']).astype(np.float32), model['w'].astype(np.float32)
    )
    with self.assertRaisesRegex(
      mj.UserError, f'w: 8 number.*{np.dtype(dtype)}, which ends at {largest}'
    ):
      mj.merge([model, model], 'linear', normalize=False)

  def test_a_dtype_that_is_asked_for(self):
    big = full(1e5)
    for kwargs in ({}, {'rules': [('w', 'copy')]}):
      with self.assertRaisesRegex(mj.UserError, 'w: 8 number.*float16'):
        mj.merge([big], 'linear', dtype=np.float16, **kwargs)
    merged = mj.merge(
      [full(5e4)], 'linear', dtype=np.float16, rules=[('w', 'copy')]
    )
    self.assertEqual(merged['w'].dtype, np.float16)

  def test_overflow_inside_of_float32(self):
    with self.assertRaisesRegex(mj.UserError, 'w: 8 number.*enlarge.$'):
      mj.merge([full(3e38)] * 2, 'linear', normalize=False)

  def test_experts_side_by_side(self):
    stacked = jax.tree.map(lambda x: np.stack([x, x]), full(4e4, np.float16))
    with self.assertRaisesRegex(mj.UserError, 'w: 8 number.*float16'):
      on_mesh.merge_experts(stacked, mean.linear(normalize=False))


if __name__ == '__main__':
  absltest.main()
