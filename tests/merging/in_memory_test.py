# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge in memory reads."""

import collections
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.checkpoints import base as store_base


class CountingStore(store_base.MemoryStore):
  """Notes which leaves are read."""

  def __init__(self, tree):
    super().__init__(tree)
    self.reads = collections.Counter()

  def leaves(self, paths):
    self.reads.update(paths)
    return super().leaves(paths)


class ReadTest(parameterized.TestCase):
  @parameterized.parameters('linear', 'task_arithmetic', 'slerp')
  def test_every_leaf_of_every_model_once(self, method):
    rng = np.random.default_rng(0)
    stores = [
      CountingStore({
        'a': {'bias': rng.normal(size=3).astype(np.float32)},
        'b': {'bias': rng.normal(size=5).astype(np.float32)},
      })
      for _ in range(3)
    ]  # fmt: skip
    base, *models = stores if method != 'linear' else (None, *stores)
    options = {'t': 0.5} if method == 'slerp' else {}
    models = models[:1] if method == 'slerp' else models
    mj.merge(models, method, base=base, **options)
    for store in (*models, base) if base is not None else models:
      self.assertEqual(dict(store.reads), {'a/bias': 1, 'b/bias': 1})


class KindsTest(parameterized.TestCase):
  @parameterized.parameters(np.int32, np.uint8, bool)
  def test_a_count_is_not_merged_with_a_weight(self, kind):
    folder = pathlib.Path(self.create_tempdir().full_path)
    leaf = {'w': np.ones(3, np.float32)}, {'w': np.zeros(3, kind)}
    for name, tree in zip('ab', leaf):
      mj.save_checkpoint(folder / f'{name}.npz', tree)
    a, b = (str(folder / f'{name}.npz') for name in 'ab')
    message = rf'! w .* expected, .*{np.dtype(kind).name}|' + (
      rf'! w {np.dtype(kind).name} expected, float32'
    )
    for first, second in ((0, 1), (1, 0)):
      with self.assertRaisesRegex(mj.UserError, message):
        mj.merge([leaf[first], leaf[second]], 'linear')
      with self.assertRaisesRegex(mj.UserError, message):
        mj.plan({'merge_method': 'linear', 'models': [a, b][:: 1 - 2 * first]})
    mj.merge([leaf[0], {'w': np.zeros(3, np.float16)}], 'linear')


if __name__ == '__main__':
  absltest.main()
