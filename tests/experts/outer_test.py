# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts that are merged while they train: what is computed, and what moves."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import optax

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.experts import branch
from mergejax.experts import outer as outer_lib
from mergejax.pods import collectives
from mergejax.pods import hlo
from mergejax.training import arrays
from mergejax.training import streams
from mergejax.training import trainer as trainer_lib
from mergejax.training import transforms

K = 4
KEY = jax.random.key(3)
host = lambda x: jax.tree.map(np.array, x)


def pictures(expert):
  rng = np.random.default_rng(expert)
  return {
    'images': rng.normal(size=(16, 4, 4, 1)).astype(np.float32),
    'labels': rng.integers(0, 4, 16).astype(np.int32),
  }


class OuterTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.module = models.build(
      dict(model_type='mlp', hidden=(8, 6), image_shape=(4, 4, 1), classes=4)
    )
    cls.mesh = partition.make_mesh(branch=2, data=2, model=2)

  def trainer(self, outer=None, optimizer=None, **settings):
    return branch.BranchTrainer(
      self.module, optimizer or optax.sgd(0.3), experts='abcd', mesh=self.mesh,
      outer=outer, **settings,
    )  # fmt: skip

  def begun(self, trainer):
    step = trainer.step(8)
    layout = trainer.layout(step)
    state = trainer.init(step, layout, jax.random.key(0))
    return trainer.compile(step, layout), state

  def stream(self):
    return branch.StackedStream(
      [arrays.ArrayStream(pictures(i), 8, seed=i) for i in range(K)]
    )

  def fit(self, outer, steps, **named):
    trainer = self.trainer(outer, named.pop('optimizer', None))
    return trainer.fit(self.stream(), steps=steps, **named)

  def shaken(self, state):
    """A state whose experts differ, laid out as it is."""
    rng = np.random.default_rng(0)
    noise = lambda x: jax.device_put(
      np.asarray(x) + rng.normal(size=x.shape).astype(np.float32), x.sharding
    )
    return state.replace(params=jax.tree.map(noise, state.params))

  def test_one_reduction_as_large_as_the_parameters(self):
    step, state = self.begun(self.trainer(outer_lib.local_sgd(2)))
    state = self.shaken(state)
    before = host(state.params)
    program = step.merge.lower(state).compile().as_text()
    self.assertIn('input_output_alias', program.splitlines()[0])
    moved = collectives.found(hlo.Program(program), self.mesh)
    self.assertLen(moved, 1)
    local = sum(
      x.addressable_shards[0].data[0].nbytes
      for x in jax.tree.leaves(state.params)
    )
    whole = sum(x[0].nbytes for x in jax.tree.leaves(state.params))
    self.assertLess(local, whole)  # the model axis divides them
    self.assertEqual(
      (moved[0].kind, moved[0].axes, moved[0].count, moved[0].given_bytes),
      ('all-reduce', ('branch',), 1, local),
    )

    merged = host(step.merge(state).params)
    expected = mj.merge([branch.unstack(before, i) for i in range(K)], 'linear')
    for path, leaf in tree.flatten(merged).items():
      for one in leaf:  # the same for every expert
        np.testing.assert_allclose(
          one, tree.flatten(expected)[path], rtol=1e-5, atol=1e-6
        )

  def test_no_collective_of_an_ordinary_step_crosses_branch(self):
    step, state = self.begun(self.trainer(outer_lib.local_sgd(2)))
    place = self.trainer().placer()
    program = step.lower(state, place(next(self.stream()))).compile().as_text()
    moved = collectives.found(hlo.Program(program), self.mesh)
    self.assertNotEmpty(moved)
    for one in moved:
      self.assertNotIn('branch', one.axes)

  def test_diloco_against_its_formula(self):
    """Nesterov's momentum on what two inner steps came to, three times."""
    rate, mu = 0.7, 0.9
    found = self.fit(outer_lib.diloco(2), 6)
    step, state = self.begun(self.trainer())
    place, stream = self.trainer().placer(), self.stream()
    anchor = tree.flatten(host(branch.unstack(state.params, 0)))
    velocity = {path: np.zeros_like(leaf) for path, leaf in anchor.items()}
    for _ in range(3):
      for _ in range(2):
        state, _ = step(state, place(next(stream)))
      for path, leaf in tree.flatten(host(state.params)).items():
        gradient = anchor[path] - leaf.mean(axis=0)
        velocity[path] = mu * velocity[path] + gradient
        anchor[path] = anchor[path] - rate * (gradient + mu * velocity[path])
      state = state.replace(
        params=tree.map_paths(
          lambda path, leaf: jax.device_put(
            np.stack([anchor[path]] * K), leaf.sharding
          ),
          state.params,
        )
      )
    for path, leaf in tree.flatten(host(found.params)).items():
      np.testing.assert_allclose(leaf[1], anchor[path], rtol=1e-3, atol=1e-4)
      np.testing.assert_array_equal(leaf[0], leaf[3])

  def test_every_step_with_a_plain_outer_step_is_averaging(self):
    plain = outer_lib.diloco(1, learning_rate=1.0, momentum=0.0)
    one, two = self.fit(plain, 3), self.fit(outer_lib.local_sgd(1), 3)
    # And of one SGD step each, the mean is synchronous training.
    together = streams.PartsStream(
      {i: arrays.ArrayStream(pictures(i), 8, seed=i) for i in range(K)},
      join=np.concatenate,
    )
    model = trainer_lib.Trainer(self.module, optax.sgd(0.3))
    synchronous = tree.flatten(host(model.fit(together, steps=3).params))
    for path, leaf in tree.flatten(host(one.params)).items():
      np.testing.assert_allclose(
        leaf, tree.flatten(host(two.params))[path], rtol=1e-5, atol=1e-6
      )
      for own in leaf:
        np.testing.assert_allclose(own, synchronous[path], rtol=1e-4, atol=1e-5)

  def test_it_goes_on_with_the_same_bits(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    whole = self.fit(outer_lib.diloco(2), 5)
    self.fit(outer_lib.diloco(2), 3, directory=folder)
    continued = self.fit(outer_lib.diloco(2), 5, directory=folder)
    jax.tree.map(np.testing.assert_array_equal, host(continued), host(whole))

  def test_it_begins_with_a_state_of_one_model(self):
    """Of a seed, which knew nothing of outer merges."""
    one = trainer_lib.Trainer(self.module, optax.sgd(0.3))
    begun = host(one.begin(6, one.family.init(jax.random.key(0)), KEY))
    found = self.fit(outer_lib.diloco(2), 3, state=begun)
    same = self.fit(outer_lib.diloco(2), 3, params=begun.params, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, host(found), host(same))
    with self.assertRaisesRegex(errors.ConfigError, 'begin as one model'):
      self.fit(outer_lib.diloco(2), 3, state=[begun] * K)

  def test_other_merges(self):
    method = mj.ties(density=0.5)
    outer = outer_lib.Outer(every=1, method=method)
    # Two runs of which one merges otherwise are not taken for the same.
    told = [
      dict(one.transform().settings)
      for one in (
        outer,
        outer_lib.Outer(every=1, method=mj.ties(density=0.25)),
        outer_lib.Outer(every=1, method=mj.linear()),
        outer_lib.Outer(every=1, importance=outer_lib.adam_fisher),
        outer_lib.local_sgd(1),
        outer_lib.Outer(every=1, optimizer=optax.sgd(0.5)),
      )
    ]
    self.assertLen({str(one) for one in told}, len(told))
    lines = errors.differences(told[0], told[1])
    self.assertNotEmpty(lines)
    for line in lines:
      self.assertRegex(line, r'^method/.*density: 0.5 there, 0.25 asked for')
    step, state = self.begun(self.trainer(outer))
    base = host(branch.unstack(state.params, 0))
    state = self.shaken(state)
    before = host(state.params)
    found = host(step.merge(state).params)
    expected = mj.merge(
      [branch.unstack(before, i) for i in range(K)], method, base=base
    )
    for path, leaf in tree.flatten(found).items():
      np.testing.assert_allclose(
        leaf[2], tree.flatten(expected)[path], rtol=1e-4, atol=1e-5
      )

  def test_fisher_of_adam(self):
    promotion = jax.numpy_dtype_promotion('standard')
    promotion.__enter__()
    self.addCleanup(promotion.__exit__, None, None, None)
    outer = outer_lib.Outer(every=9, importance=outer_lib.adam_fisher)
    trainer = self.trainer(outer, optax.adam(0.01))
    step, state = self.begun(trainer)
    state, _ = step(state, trainer.placer()(next(self.stream())))
    before = host(state)
    fisher = tree.flatten(jax.vmap(outer_lib.adam_fisher)(before))
    found = host(step.merge(state).params)
    for path, leaf in tree.flatten(before.params).items():
      wide = np.asarray(fisher[path], np.float64)
      expected = (wide * leaf).sum(axis=0) / wide.sum(axis=0)
      np.testing.assert_allclose(
        tree.flatten(found)[path][0], expected, rtol=1e-4, atol=1e-5
      )

  def test_mistakes(self):
    for make, message in (
      (lambda: outer_lib.local_sgd(0), 'every must be a whole number'),
      (lambda: outer_lib.Outer(every=1, method=mj.fisher()),
       'needs a fisher cannot collect'),
      (lambda: outer_lib.Outer(
        every=1, method=mj.ties(), importance=outer_lib.adam_fisher),
       'give no method beside it'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, message):
        make()
    outer = outer_lib.Outer(every=1, importance=outer_lib.adam_fisher)
    step, state = self.begun(self.trainer(outer))
    with self.assertRaisesRegex(errors.ConfigError, 'no second moments'):
      step.merge(state)
    every = outer_lib.local_sgd(5)
    for begins, ends in ((0, 4), (5, 9), (3, 3)):
      with self.assertRaisesRegex(errors.ConfigError, 'never meet between'):
        every.check_meets(begins, ends)
    every.check_meets(0, 5)
    every.check_meets(4, 6)
    twice = transforms.ema(0.5, name='outer')
    with self.assertRaisesRegex(errors.ConfigError, "called 'outer'"):
      self.trainer(outer, transforms=[twice]).step(1)


if __name__ == '__main__':
  absltest.main()
