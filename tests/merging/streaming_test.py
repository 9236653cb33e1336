# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A merge that grows one model at a time is the merge of all of them."""

from absl.testing import absltest
import ml_dtypes
import numpy as np

from mergejax.merging import in_memory
from mergejax.merging import streaming
from mergejax.methods import arithmetic
from mergejax.methods import mean
from mergejax.methods import ties


class StreamTest(absltest.TestCase):
  def test_it_gives_the_bits_of_a_merge_and_still_grows(self):
    rng = np.random.default_rng(0)
    base, *models = [
      {'w': rng.normal(size=(5, 3)).astype(ml_dtypes.bfloat16)}
      for _ in range(4)
    ]
    weights = (0.5, 2.0, 1.0)
    for method, origin in (
      (mean.linear(), None),
      (arithmetic.task_arithmetic(scale=0.5), base),
    ):
      stream = streaming.Stream(method)
      at = None if origin is None else origin['w']
      state = None
      for k, model in enumerate(models):
        state = stream.add(state, model['w'], weights[k], at)
        merged = in_memory.merge(
          models[: k + 1], method, base=origin, weights=weights[: k + 1]
        )
        found = stream.result(state, ml_dtypes.bfloat16, at)
        np.testing.assert_array_equal(found, merged['w'])

  def test_methods_with_first_passes_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'first passes'):
      streaming.Stream(ties.ties())


if __name__ == '__main__':
  absltest.main()
