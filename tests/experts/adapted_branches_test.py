# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters of one base that train side by side, one for each expert."""

from absl.testing import absltest
import jax
import numpy as np
import optax
import small_adapted

import mergejax as mj
from mergejax.core import tree
from mergejax.experts import branch
from mergejax.training import trainer as trainer_lib

EXPERTS = ['a', 'b']


class AdaptedBranchesTest(absltest.TestCase):
  def test_each_has_its_adapter_and_the_same_base(self):
    family, base = small_adapted.build('lm', num_layers=1)
    adapted = mj.adapters.adapt(family, mj.adapters.ia3())
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    own = [small_adapted.batch(8, seed=seed) for seed in (1, 2)]
    stacked = {name: np.stack([x[name] for x in own]) for name in own[0]}
    mesh = mj.partition.make_mesh(devices=jax.devices()[:2], branch=2)
    together = branch.BranchTrainer(
      adapted, optax.sgd(0.1, momentum=0.9), experts=EXPERTS, mesh=mesh
    ).fit([stacked] * 2, steps=2, params=params)
    one = mj.partition.make_mesh(devices=jax.devices()[:1])
    trainer = trainer_lib.Trainer(
      adapted, optax.sgd(0.1, momentum=0.9), mesh=one
    )
    alone = [
      tree.flatten(trainer.fit([batch] * 2, steps=2, params=params).params)
      for batch in own
    ]
    before = tree.flatten(params)
    for path, leaf in tree.flatten(jax.device_get(together.params)).items():
      self.assertEqual(leaf.shape, (2, *before[path].shape), path)
      for number in range(2):
        if path in adapted.base_specs:  # the base, once for each expert
          np.testing.assert_array_equal(leaf[number], before[path], path)
        else:
          np.testing.assert_allclose(
            leaf[number], alone[number][path], rtol=1e-4, atol=1e-5
          )
      if path in adapted.adapter_specs:
        self.assertGreater(np.abs(leaf[0] - leaf[1]).max(), 1e-3, path)
    # Moments are those of the adapters alone.
    moments = sum(x.size for x in jax.tree.leaves(together.opt_state))
    numbers = mj.adapters.count(adapted.adapter, adapted.base_specs)
    self.assertEqual(moments, 2 * numbers)


if __name__ == '__main__':
  absltest.main()
