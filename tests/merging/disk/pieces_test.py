# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pieces of leaves: what they hand to a method, and what they refuse."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax import methods
from mergejax.core import errors
from mergejax.merging.disk import pieces


class PiecesTest(parameterized.TestCase):
  def test_results_that_their_dtype_cannot_hold_are_refused(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    model = {
      'a.weight': np.full((4, 3), 5e4, np.float32),
      'b.bias': np.full(3, 1e5, np.float32),
      'experts.kernel': np.ones((2, 4, 3), np.float32),
    }
    path = str(folder / 'a.safetensors')
    mj.save_checkpoint(path, model)
    base = str(folder / 'base.safetensors')
    mj.save_checkpoint(base, {p: 0 * leaf for p, leaf in model.items()})
    recipe = lambda scale, **more: {
      'merge_method': 'task_arithmetic', 'models': [path], 'base_model': base,
      'parameters': {'lambda': scale}, 'dtype': 'float16', **more,
    }  # fmt: skip
    whole = dict(axes=[['experts.kernel', ['expert', 'embed', 'mlp']]])
    cases = (
      (recipe(0.5), ''),
      (recipe(2.0, rules=[{'match': 'b.*', 'copy': base}]), 'a.weight: 12'),
      (recipe(0.5, rules=[{'match': 'b.bias', 'copy': path}]), 'b.bias: 3'),
      (recipe(1e5, rules=[{'match': '[ab].*', 'copy': base}], **whole),
       'experts.kernel: 24'),
    )  # fmt: skip
    for i, (one, message) in enumerate(cases):
      out = folder / f'{i}.safetensors'
      if not message:
        mj.execute(mj.plan(one), out)
        continue
      with self.assertRaisesRegex(
        mj.UserError, f'{message}.*float16, which ends at 65504'
      ):
        mj.execute(mj.plan(one), out)
      self.assertFalse(out.exists())

  def test_two_statistics_of_a_leaf_go_to_their_models(self):
    """A piece hands every model each of its statistics, by name."""
    task = mock.Mock(
      inputs=[('a', 'w'), ('b', 'w')], base=('c', 'w'),
      stats=({'fisher': 'w/fisher', 'second': 'w/second'},) * 2,
    )  # fmt: skip
    leaf = pieces.Leaf.__new__(pieces.Leaf)
    leaf._task = task
    leaves, base, stats = leaf._roles([10, 20, 30, 11, 12, 21, 22])
    self.assertEqual((leaves, base), ([10, 20], 30))
    self.assertEqual(
      stats, [{'fisher': 11, 'second': 12}, {'fisher': 21, 'second': 22}]
    )

  @parameterized.product(
    kind=('fisher', 'own'), bad=(-1.0, np.nan), whole=(False, True)
  )
  def test_statistics_are_refused_on_disk_as_in_memory(self, kind, bad, whole):
    """Piece by piece and whole; one that may be anything passes."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    name = 'layers/kernel' if whole else 'kernel'
    shape = (2, 4, 3) if whole else (4, 3)
    axes = {name: ('layers', 'embed', 'mlp')[-len(shape) :]}
    leaf = np.ones(shape, np.float32)
    wrong = leaf.copy()
    wrong[..., 1, 2] = bad
    models, stats = [], []
    for k, found in enumerate((leaf, wrong)):
      models.append(str(folder / f'{k}.safetensors'))
      mj.save_checkpoint(models[-1], {name: leaf * k}, axes=axes)
      stats.append(str(folder / f'stats_{k}.safetensors'))
      mj.save_checkpoint(stats[-1], {f'{name}/{kind}': found})
    method = 'fisher'
    if kind == 'own':
      method = methods.leafwise(
        lambda zeros: zeros,
        lambda state, leaf, base, weight, context: state + leaf,
        lambda state, base: state,
        needs=(mj.stats.StatisticSpec(kind, values='any'),),
      )
    recipe = {'merge_method': method, 'models': models, 'stats': stats}
    given = [{name: {kind: found}} for found in (leaf, wrong)]
    run = (
      lambda: mj.merge(models, method, stats=given),
      lambda: mj.execute(mj.plan(recipe), folder / 'out.safetensors'),
    )
    for merge in run:
      if kind == 'own':
        merge()
        continue
      with self.assertRaisesRegex(
        errors.DataError, 'negative' if bad < 0 else 'not finite'
      ):
        merge()


if __name__ == '__main__':
  absltest.main()
