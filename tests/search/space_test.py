# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is searched over: recipes give the merges that were scored."""

import pathlib
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax.core import errors
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.search import base

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_models  # noqa: E402

make_models = small_models.make_models


class SpaceTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(method='linear', vary='weights'),
    dict(method='task_arithmetic', vary='scale'),
    dict(method='task_arithmetic', vary='weight', high=2.0),
    dict(method='ties', vary='scale', options={'density': 0.5}),
    dict(
      method='ties',
      vary='scale',
      options={'density': [0.5, 0.3]},
      weights=(0.4, 0.9),
    ),
    dict(method='linear', vary='weights', blocks=('layers_0/', '*')),
    dict(method='task_arithmetic', vary='scale', blocks=('layers_0/', '*')),
    dict(
      method='ties',
      vary='weights',
      options={'density': 0.5, 'trim_scope': 'tensor'},
      blocks=('layers_0/', '*'),
    ),
  )
  def test_the_recipe_gives_the_same_merge(self, **fields):
    folder = pathlib.Path(self.create_tempdir().full_path)
    models = make_models(2)
    origin = make_models(1, seed=1)[0]
    names = []
    for i, model in enumerate([origin, *models]):
      names.append(str(folder / f'{i}'))
      mj.save_checkpoint(names[-1], model, 'safetensors')
    space = base.Space(count=2, **fields)
    point = np.random.default_rng(0).uniform(0.1, 1, len(space.names))
    needs_base = fields['method'] != 'linear'
    here = jax.jit(lambda models, point: space.merge(
        models, point, base=origin if needs_base else None
    ))(models, jnp.asarray(point, jnp.float32))  # fmt: skip
    recipe = space.to_recipe(point, names[1:], names[0] if needs_base else None)
    if fields['method'] == 'ties':
      recipe['parameters']['normalize'] = space.options.get('normalize', True)
    out = folder / 'out'
    mj.execute(mj.plan(recipe_lib.parse_recipe(recipe)), out)
    there = mj.open_checkpoint(out).read()
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      here,
      there,
    )

  def test_blocks_of_what_looks_at_a_whole_model_are_refused(self):
    """Their recipe would not be what was scored."""
    for method, options in (('ties', {'trim_scope': 'global'}), ('fisher', {})):
      make = lambda blocks, method=method, options=options: base.Space(
        method, 2, options=options, blocks=blocks
      )
      make(('*',))
      with self.assertRaisesRegex(errors.ConfigError, 'looks at a whole model'):
        make(('layers_0/', '*'))

  def test_learned_coefficients_of_leaves_that_share_part_of_their_path(self):
    rng = np.random.default_rng(0)
    tree = lambda: {
      'conv': {'kernel': rng.normal(size=3).astype(np.float32)},
      'layer': {'conv': {'kernel': rng.normal(size=3).astype(np.float32)}},
    }
    models = [tree(), tree()]
    coefficients = {
      'conv/kernel': np.array([1.0, 0.0]),
      'layer/conv/kernel': np.array([0.0, 1.0]),
    }
    space, point = base.learned_space('linear', coefficients)
    merged = space.merge(models, np.float32(point))
    np.testing.assert_allclose(
      merged['conv']['kernel'], models[0]['conv']['kernel']
    )
    np.testing.assert_allclose(
      merged['layer']['conv']['kernel'], models[1]['layer']['conv']['kernel']
    )

  def test_bad_spaces(self):
    with self.assertRaisesRegex(errors.UserError, "'scale'"):
      base.Space('task_arithmetic', 2, vary='scail')
    with self.assertRaisesRegex(errors.UserError, 'low < high'):
      base.Space('linear', 2, low=1.0, high=0.0)


if __name__ == '__main__':
  absltest.main()
