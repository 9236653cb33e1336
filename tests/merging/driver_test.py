# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge in memory reads."""

import collections

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.store import base as store_base


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


if __name__ == '__main__':
  absltest.main()
