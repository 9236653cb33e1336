# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Clusters of equal size, and where contexts are sent."""

import itertools
import pathlib
import random
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.core import errors
from mergejax.experts import clusters as clusters_lib
from mergejax.experts import ensemble
from mergejax.experts import route

TOPICS = {
  'sea': 'wave ship sail harbour tide anchor coast fish'.split(),
  'law': 'court judge appeal statute ruling verdict counsel clause'.split(),
  'sky': 'star planet orbit comet galaxy telescope moon nebula'.split(),
}


def documents(each, seed=0):
  """`(texts, topic numbers)`, the first topic twice as often as it should."""
  rng = random.Random(seed)
  texts, topics = [], []
  for number, words in enumerate(TOPICS.values()):
    for _ in range(each):
      texts.append(' '.join(rng.choices(words, k=12)))
      topics.append(number)
  return texts, np.array(topics)


class ClustersTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.texts, cls.topics = documents(20)
    cls.clusters = clusters_lib.fit(cls.texts, 3, directions=8)

  def test_topics_are_found(self):
    found = self.clusters.assignment
    for number in range(3):
      self.assertLen(set(found[self.topics == number]), 1)
    np.testing.assert_array_equal(self.clusters.nearest(self.texts), found)
    fresh, topics = documents(5, seed=1)
    of_topic = [found[self.topics == t][0] for t in topics]
    np.testing.assert_array_equal(self.clusters.nearest(fresh), of_topic)

  @parameterized.parameters((60, 3), (61, 3), (7, 7), (23, 5), (9, 1))
  def test_sizes_differ_by_one_at_most(self, points, count):
    rng = np.random.default_rng(points)
    # Most points are nearest to one cluster.
    costs = rng.uniform(size=(points, count)) + np.arange(count)
    found = clusters_lib.balanced_assignment(costs)
    sizes = np.bincount(found, minlength=count)
    self.assertEqual(sizes.sum(), points)
    self.assertLessEqual(sizes.max() - sizes.min(), 1)

  def test_it_is_near_the_best_balanced_assignment(self):
    rng = np.random.default_rng(0)
    for _ in range(20):
      costs = rng.uniform(size=(6, 2))
      best = min(
        costs[list(first), 0].sum()
        + costs[[i for i in range(6) if i not in first], 1].sum()
        for first in itertools.combinations(range(6), 3)
      )
      found = clusters_lib.balanced_assignment(costs)
      # Of two clusters the greedy order is optimal.
      self.assertAlmostEqual(costs[np.arange(6), found].sum(), best)

  def test_unbalanced_topics_are_cut_to_equal_sizes(self):
    texts = self.texts[:30]  # 20 of the sea, 10 of the law
    found = clusters_lib.fit(texts, 2, directions=8)
    np.testing.assert_array_equal(np.bincount(found.assignment), [15, 15])
    law = found.assignment[20:]
    self.assertLen(set(law), 1)

  def test_what_is_loaded_is_what_was_saved(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / 'clusters'
    self.clusters.save(folder)
    loaded = clusters_lib.load(folder)
    np.testing.assert_array_equal(
      loaded.embed(self.texts), self.clusters.embed(self.texts)
    )
    np.testing.assert_array_equal(loaded.centres, self.clusters.centres)
    again = clusters_lib.fit(self.texts, 3, directions=8)
    np.testing.assert_array_equal(again.assignment, self.clusters.assignment)

  def test_weights_of_contexts(self):
    contexts = ['the court and a judge', 'a comet', '', 'zzz qqq']
    found = route.Router(self.clusters, temperature=0.3).weights(contexts)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    points = self.clusters.embed(contexts)
    for row, point in zip(found[:2], points):
      near = [
        np.exp(-float(((point - c) ** 2).sum()) / 0.3)
        for c in self.clusters.centres
      ]
      np.testing.assert_allclose(row, near / np.sum(near), rtol=1e-4)
    law = self.clusters.assignment[self.topics == 1][0]
    self.assertEqual(np.argmax(found[0]), law)
    np.testing.assert_allclose(found[2:], 1 / 3)
    top = route.Router(self.clusters, temperature=0.3, top_k=1)
    np.testing.assert_array_equal(top.weights(contexts[:1])[0], np.eye(3)[law])

  def test_an_ensemble_goes_by_them(self):
    weights = route.Router(self.clusters, top_k=2).weights(['a ship', 'a moon'])
    lp = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    mask = np.ones((2, 4), bool)
    found = ensemble.log_likelihood(lp, mask, weights.T, kind='fixed')
    expected = np.log(np.einsum('bk,kbt->bt', weights, np.exp(lp)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)

  def test_mistakes(self):
    for make, message in (
      (lambda: clusters_lib.fit(['a b'], 2), '1 documents do not make 2'),
      (lambda: clusters_lib.fit(self.texts, 0), 'clusters must be'),
      (lambda: clusters_lib.fit(['moon', 'tide', 'law'], 2), 'No word stands'),
      (lambda: clusters_lib.load('/nowhere'), 'holds no clusters'),
      (lambda: route.Router(self.clusters, temperature=0), 'temperature must'),
      (lambda: route.Router(self.clusters, top_k=0), 'top-k must be a whole'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        make()
    with mock.patch.dict('sys.modules', {'sklearn.cluster': None}):
      with self.assertRaisesRegex(errors.ConfigError, r'mergejax\[clusters\]'):
        clusters_lib.fit(self.texts, 2)


if __name__ == '__main__':
  absltest.main()
