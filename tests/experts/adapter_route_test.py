# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Texts go to the adapters whose texts they are near to, in one batch."""

import pathlib
import tempfile

from absl.testing import absltest
import numpy as np
import small_adapted

import mergejax as mj
from mergejax.core import errors
from mergejax.experts import clusters as clusters_lib

# In another order than that of their names.
GROUPS = {
  'sea': ['wave ship sail harbour', 'ship tide anchor', 'sail coast harbour'],
  'law': ['court judge appeal', 'judge statute ruling appeal'],
  'moon': ['star orbit comet', 'comet star nebula', 'orbit nebula'],
}


class AdapterRouteTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.family, cls.base = small_adapted.build('t5')
    adapted = mj.adapters.adapt(cls.family, mj.adapters.ia3())
    for seed, name in enumerate(GROUPS):
      own = {
        path: np.random.default_rng(seed).normal(1, 0.5, spec.shape)
        for path, spec in adapted.adapter_specs.items()
      }
      own = {path: leaf.astype(np.float32) for path, leaf in own.items()}
      params = adapted.joined(cls.base, own)
      mj.adapters.save(cls.folder / name, adapted, params)
    cls.library = mj.adapters.Library(cls.folder)
    cls.clusters = clusters_lib.of_groups(GROUPS, min_documents=1)
    cls.router = mj.experts.AdapterRouter(
      cls.library, mj.experts.Router(cls.clusters), list(GROUPS)
    )

  def test_centres_are_means(self):
    for centre, texts in zip(self.clusters.centres, GROUPS.values()):
      points = self.clusters.embed(texts)
      np.testing.assert_allclose(centre, points.mean(axis=0), atol=1e-6)
    self.assertEqual(
      self.clusters.assignment.tolist(), [0, 0, 0, 1, 1, 2, 2, 2]
    )

  def test_picks(self):
    order = list(self.library.cards)
    self.assertEqual(order, ['law', 'moon', 'sea'])
    texts = ['anchor and tide', 'the statute', 'nebula', 'ship']
    ids = self.router.ids(texts)
    self.assertEqual(ids.dtype, np.int32)
    self.assertEqual([order[i] for i in ids], ['sea', 'law', 'moon', 'sea'])
    weights = self.router.weights(texts)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    # By cluster, in the clusters' order: the same numbers, moved.
    plain = self.router.router.weights(texts)
    np.testing.assert_array_equal(
      weights, plain[:, [1, 2, 0]]
    )  # law, moon, sea
    # One batch, each row with its own, equals each adapter by itself.
    family, params = self.library.bank(self.family, self.base)
    batch = small_adapted.batch(4)
    logits = family.apply(
      family.variables(params), {**batch, 'expert_ids': ids}
    ).logits
    alone = {
      name: one.apply(one.variables(own), batch).logits
      for name, one, own in self.library.experts(self.family, self.base)
    }
    for row, number in enumerate(ids):
      np.testing.assert_allclose(
        logits[row], alone[order[number]][row], rtol=1e-5, atol=1e-5
      )
    self.assertGreater(np.abs(alone['law'] - alone['sea']).max(), 0.01)

  def test_mistakes(self):
    router = self.router.router
    for names, message in (
      (['sea', 'law'], '3 clusters need one adapter each'),
      (['sea', 'law', 'law'], '3 clusters need one adapter each'),
      (['sea', 'law', 'mon'], "Did you mean 'moon'"),
    ):
      with self.assertRaisesRegex(errors.ConfigError, message):
        mj.experts.AdapterRouter(self.library, router, names)
    with self.assertRaisesRegex(errors.ConfigError, 'without a text.*none'):
      clusters_lib.of_groups({'one': ['word'], 'none': []})
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name, adapter in (('a', mj.adapters.lora(rank=1)),
                          ('b', mj.adapters.lora(rank=2))):  # fmt: skip
      adapted = mj.adapters.adapt(self.family, adapter)
      own = small_adapted.leaves(adapted.adapter_specs)
      mj.adapters.save(folder / name, adapted, adapted.joined(self.base, own))
    with self.assertRaisesRegex(errors.ConfigError, 'b is .* one form'):
      mj.adapters.Library(folder).bank(self.family, self.base)


if __name__ == '__main__':
  absltest.main()
