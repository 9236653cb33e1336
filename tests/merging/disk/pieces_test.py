# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pieces of leaves: what they hand to a method, and what they refuse."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
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


if __name__ == '__main__':
  absltest.main()
