# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Order statistics in pieces equal a sort, whatever the sample was."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.merging.disk import ranks


class RankerTest(parameterized.TestCase):
  @parameterized.product(
    kind=['normal', 'ties', 'zeros', 'constant', 'rows'], pieces_count=[1, 7]
  )
  def test_equals_a_sort(self, kind, pieces_count):
    rng = np.random.default_rng(0)
    size = 20_000
    scores = {
      'normal': rng.normal(size=size),
      'ties': rng.integers(0, 9, size=size),
      'zeros': rng.normal(size=size) * (rng.random(size) < 0.03),
      'constant': np.ones(size),
      # A sample of the wrong part: the bracket must move.
      'rows': np.sort(rng.normal(size=size)),
    }[kind]
    scores = np.abs(scores.astype(np.float32))
    sample = scores[:400] if kind == 'rows' else scores[::50]
    order = np.lexsort((np.arange(size), -scores))
    edges = np.linspace(0, size, pieces_count + 1).astype(int)
    parts = {int(a): scores[a:b] for a, b in zip(edges[:-1], edges[1:])}
    for rank in (0, 1, 13, 4000, 10_000, 19_999, 20_000):
      ranker = ranks.Ranker(size, rank, sample)
      for _ in range(4):
        if ranker.done is not None:
          break
        for start, part in parts.items():
          places = ranks.places(part, ranker.low, ranker.high)
          index = np.flatnonzero(places == 2)
          ranker.add(places, index, part[index], start)
        ranker.conclude(
          lambda start, r=ranker: ranks.places(parts[start], r.low, r.high)
        )
      cut = ranker.done
      kept = (scores > cut.threshold) | (
        (scores == cut.threshold) & (np.arange(size) < cut.end)
      )
      expected = np.zeros(size, bool)
      expected[order[:rank]] = True
      np.testing.assert_array_equal(kept, expected)


if __name__ == '__main__':
  absltest.main()
