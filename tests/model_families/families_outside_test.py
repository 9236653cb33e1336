# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A model family in a file of its own, outside of the package."""

import sys

from absl.testing import absltest
import flax.linen as nn
import jax
import numpy as np
import one_command

import mergejax as mj
from mergejax import models
from mergejax.core import tree
from mergejax.core import typing
from mergejax.names import known

FAMILY = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from mergejax import models


@dataclasses.dataclass(frozen=True)
class {name}Config:
  width: int = 4
  layers: int = 2
  classes: int = 3


class Layer(nn.Module):
  width: int

  @nn.compact
  def __call__(self, carry, _):
    return nn.tanh(nn.Dense(self.width, name='dense')(carry)), None


class {name}(nn.Module):
  config: {name}Config

  @nn.compact
  def __call__(self, features):
    # A scanned stack: one kernel of all layers.
    stack = nn.scan(
      Layer, variable_axes={{'params': 0, 'intermediates': 0}},
      split_rngs={{'params': True}}, length=self.config.layers,
    )
    hidden, _ = stack(self.config.width, name='layers')(features, None)
    return nn.Dense(self.config.classes, name='head')(hidden)


@models.register
class {name}Family(models.ModelFamily):
  model_type = '{kind}'
  config_class = {name}Config
  module_class = {name}
  axes = (
    ('layers/dense/kernel', ('layers', 'embed', 'mlp')),
    ('layers/dense/bias', ('layers', 'mlp')),
    ('head/kernel', ('embed', 'classes')),
    ('head/bias', ('classes',)),
  )

  features = 'head/kernel'

  def arguments(self, batch, *, train=False):
    return [batch['features']], {{}}

  def example_batch(self, rows=1, *, length=1):
    return {{
      'features': jnp.zeros((rows, self.config.width)),
      'labels': jnp.zeros((rows,), jnp.int32),
    }}
"""


class FamiliesOutsideTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    # A module that is imported by its file brings its folder along.
    before = list(sys.path)
    self.addCleanup(lambda: sys.path.__setitem__(slice(None), before))

  def write(self, name, kind):
    text = FAMILY.format(name=name, kind=kind)
    return self.create_tempfile(f'{kind}_module.py', text).full_path

  def test_a_file_that_is_imported_is_a_model_like_any_other(self):
    file = self.write('Toy', 'toy')
    config = {'model_type': 'toy', 'width': 4}
    with self.assertRaisesRegex(mj.UserError, '--import MODULE'):
      models.build(config)

    code, _, err = one_command.run('methods', '--import', file)
    self.assertEqual(code, 0, err)
    module = models.build(config)
    family = models.family_of(module)
    self.assertEqual(models.describe(module)['layers'], 2)
    params = family.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
      'features': rng.normal(size=(6, 4)).astype(np.float32),
      'labels': np.array([0, 1, 2, 0, 1, 2], np.int32),
      'weights': np.array([1, 1, 1, 1, 1, 0], np.float32),
    }
    # Everything that takes a module takes a family, and goes by its names.
    gram = mj.stats.collect(mj.stats.gram(), module, params, [batch])
    self.assertEqual(gram['layers/dense/kernel']['gram'].shape, (2, 4, 4))
    rows = batch['features'][:5].astype(np.float64)
    np.testing.assert_allclose(
      gram['layers/dense/kernel']['gram'][0], rows.T @ rows / 5, rtol=1e-5
    )
    fisher = mj.stats.collect(mj.stats.fisher(), family, params, [batch])
    self.assertEqual(fisher['head/kernel']['count'], 5)
    found = mj.select.extract(family, params, [batch])
    self.assertEqual(found.shape, (5, 4))

    # Its axes go with its checkpoints: a stack is merged layer by layer.
    paths = []
    for k in range(2):
      paths.append(self.create_tempdir().full_path + '/model')
      mj.save_checkpoint(
        paths[-1],
        family.init(jax.random.key(k)),
        config=models.describe(module),
      )
    module, first = mj.load_model(paths[0])
    self.assertEqual(models.family_of(module).model_type, 'toy')
    merged = mj.merge(paths, 'karcher')['layers']['dense']['kernel']
    kernel = lambda path: mj.load_model(path)[1]['layers']['dense']['kernel']
    for i in range(2):
      one = mj.merge([{'w': kernel(path)[i]} for path in paths], 'karcher')['w']
      np.testing.assert_allclose(merged[i], one, rtol=1e-5, atol=1e-6)
    self.assertEqual(tree.specs(first).keys(), tree.specs(params).keys())

  def test_an_import_path_is_known_once_it_is_imported(self):
    file = self.write('Path', 'path')
    config = {'model_type': 'path_module:PathFamily', 'layers': 1}
    with self.assertRaisesRegex(mj.UserError, 'no checkpoint may choose'):
      models.build(config)
    self.assertNotIn('path_module', sys.modules)
    code, _, err = one_command.run('methods', f'--import={file}')
    self.assertEqual(code, 0, err)
    module = models.build(config)
    self.assertEqual(module.config.layers, 1)

  def test_a_module_of_no_family_is_called_as_its_batch_tells(self):
    tokens = np.array([[3, 1], [0, 0]])
    text = {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens}
    for kind, batch in (
      ('lm', text), ('t5x', {**text, 'encoder_input_tokens': tokens}),
    ):  # fmt: skip
      for module in (None, nn.Dense(2)):
        family = models.family_for(module, batch)
        self.assertEqual(family.model_type, kind)
        self.assertEqual(family.real_rows(batch).tolist(), [True, False])

  def test_axes_may_be_told_path_by_path(self):
    known.register('by_path', {'a.b/kernel': ['embed', 'mlp']})
    specs = {
      path: typing.LeafSpec((2, 3), np.dtype('float32'))
      for path in ('a.b/kernel', 'acb/kernel')
    }
    self.assertEqual(
      known.axes(specs, {'model_type': 'by_path'}),
      {'a.b/kernel': ('embed', 'mlp')},
    )

  def test_mistakes(self):
    code, _, err = one_command.run('methods', '--import', 'no_such_thing')
    self.assertEqual(code, 2)
    self.assertIn('there is no module of this name', err)
    code, _, err = one_command.run('methods', '--import')
    self.assertEqual(code, 2)
    self.assertIn('needs the name of a module', err)


if __name__ == '__main__':
  absltest.main()
