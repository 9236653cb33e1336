# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact ranks over more elements than one word counts."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax.core import errors
from mergejax.core import numerics


def short_words():
  """Counts of 8 bits: 256 elements behave as 2**32 do."""
  return mock.patch.object(numerics, '_COUNT', jnp.uint8)


class LargestTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # What was compiled for words of another size.
    jax.clear_caches()
    cls.enterClassContext(short_words())
    cls.addClassCleanup(jax.clear_caches)

  @parameterized.product(
    rank=[0, 1, 255, 256, 257, 511, 512, 700, 999, 1000],
    kind=['distinct', 'ties', 'constant'],
  )
  def test_counts_of_many_arrays_together(self, rank, kind):
    rng = np.random.default_rng(0)
    sizes = (250, 255, 0, 1, 249, 245)
    scores = [
      {
        'distinct': rng.normal(size=n),
        'ties': rng.integers(0, 3, size=n),
        'constant': np.ones(n),
      }[kind].astype(np.float32)
      for n in sizes
    ]
    indices = [np.arange(n, dtype=np.uint32) for n in sizes]
    cuts = numerics.largest(scores, rank, indices)
    kept = [
      np.asarray(numerics.above(s, cut, i))
      for s, cut, i in zip(scores, cuts, indices)
    ]
    whole = np.concatenate(scores)
    order = np.lexsort((np.arange(whole.size), -whole))
    expected = np.zeros(whole.size, bool)
    expected[order[:rank]] = True
    np.testing.assert_array_equal(np.concatenate(kept), expected)

  def test_one_array_that_is_too_long_is_refused(self):
    with self.assertRaisesRegex(errors.UserError, '256 elements in one pie'):
      numerics.largest(
        [np.ones(256, np.float32)], 3, [np.arange(256, dtype=np.uint32)]
      )


class CountableTest(parameterized.TestCase):
  """What numbers elements is refused on leaves that 32 bits cannot number."""

  def models(self):
    rng = np.random.default_rng(0)
    return [
      {'w/kernel': rng.normal(size=(2, 200)).astype(np.float32)}
      for _ in range(3)
    ]

  @parameterized.parameters(
    ('ties', True), ('dare_linear', True), ('breadcrumbs', True),
    ('sce', True), ('arcee_fusion', True), ('ram_plus', True),
    ('task_arithmetic', False), ('ram', False),
  )  # fmt: skip
  def test_in_memory_and_in_the_plan(self, method, refused):
    base, *models = self.models()
    if method == 'arcee_fusion':
      models = models[:1]
    folder = pathlib.Path(self.create_tempdir().full_path)
    paths = [str(folder / f'{n}.npz') for n in ('base', 'a', 'b')]
    for path, tree in zip(paths, [base, *models]):
      mj.save_checkpoint(path, tree)
    recipe = {
      'merge_method': method,
      'base_model': paths[0],
      'models': paths[1 : len(models) + 1],
    }
    options = {}
    if method == 'dare_linear':
      options = recipe['parameters'] = {'density': 0.5}
    whole = lambda: mj.merge(models, method, base=base, **options)
    with short_words():
      if not refused:
        whole()
        mj.plan(recipe)
        return
      for run in (whole, lambda: mj.plan(recipe)):
        with self.assertRaisesRegex(
          errors.UserError, 'kernel has 400 elements in o'
        ):
          run()

  def test_a_slice_of_a_stack_counts_alone(self):
    base, *models = self.models()
    axes = [('w/kernel', ('layers', 'embed'))]
    with short_words():
      merged = mj.merge(
        models, 'ties', base=base, axes=axes, density=0.5, trim_scope='tensor'
      )
    expected = [
      mj.merge(
        [{'w/kernel': m['w/kernel'][i]} for m in models], 'ties',
        base={'w/kernel': base['w/kernel'][i]},
        density=0.5, trim_scope='tensor',
      )['w/kernel']
      for i in range(2)
    ]  # fmt: skip
    np.testing.assert_array_equal(merged['w/kernel'], np.stack(expected))


if __name__ == '__main__':
  absltest.main()
