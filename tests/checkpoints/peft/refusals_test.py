# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters that are refused by name, and models that are no adapters."""

import json

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import numpy as np

import mergejax as mj
from mergejax.checkpoints.peft import kinds

Q = 'layers.0.q'
KERNEL = f'{Q}.weight'


class RefusalTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    self.base = {KERNEL: self.disk.random(6, 4)}
    self.pair = {
      f'{Q}.lora_A.weight': self.disk.random(2, 4),
      f'{Q}.lora_B.weight': self.disk.random(6, 2),
    }

  def refused(self, pattern, adapter=None, **config):
    adapter = self.pair if adapter is None else adapter
    with self.assertRaises(mj.UserError) as caught:
      self.disk.open(self.base, adapter, **config)
    self.assertRegex(caught.exception.message, pattern)
    return caught.exception.message

  @parameterized.parameters(*kinds.REFUSED.items())
  def test_kinds(self, name, reason):
    text = self.refused(f'of kind {name}, which cannot', peft_type=name)
    self.assertIn(reason, text)
    self.assertNotIn('Is this the model', text)

  @parameterized.parameters(
    ('alora_invocation_tokens', [1, 2]),
    ('layer_replication', [[0, 2], [1, 3]]),
    ('megatron_config', {'x': 1}),
    ('arrow_config', {'x': 1}),
    ('use_qalora', True),
    ('use_bdlora', {'nblocks': 2}),
    ('init_lora_weights', 'corda'),
    ('init_lora_weights', 'loftq'),
    ('init_lora_weights', 'lora_ga'),
    ('init_lora_weights', 'pissa_niter_4'),
    ('a_variant_of_tomorrow', True),
  )
  def test_settings_that_mean_something_else(self, key, value):
    text = self.refused(key, **{key: value})
    if isinstance(value, str):
      self.assertIn(value, text)

  def test_an_unknown_kind(self):
    self.refused('of kind NOVEL, .* known are ADALORA', peft_type='novel')

  @parameterized.parameters(
    ({'lora_B': (5, 2)}, 'does not fit'),
    ({'lora_A': (2, 5)}, 'does not fit'),
    ({'lora_B': (6, 3)}, 'does not fit'),
    ({'lora_B': None}, r'needs .*lora_A.*lora_B'),
  )
  def test_shapes_are_seen_in_the_plan(self, change, pattern):
    adapter = dict(self.pair)
    for part, shape in change.items():
      del adapter[f'{Q}.{part}.weight']
      if shape is not None:
        adapter[f'{Q}.{part}.weight'] = self.disk.random(*shape)
    self.refused(pattern, adapter)

  def test_what_the_model_lacks(self):
    bias = self.disk.random(6)
    self.refused('lora_bias', {**self.pair, f'{Q}.lora_B.bias': bias})

  def test_a_bias_that_the_model_lacks(self):
    bias = {f'{Q}.bias': self.disk.random(6)}
    self.refused("trained with bias: 'all'", {**self.pair, **bias}, bias='all')

  def test_more_tokens_than_the_base(self):
    self.base['embed.weight'] = self.disk.random(10, 4)
    new = {'embed.weight': self.disk.random(12, 4)}
    self.refused(r'resize_token_embeddings\(12\)', {**self.pair, **new})

  def test_rows_that_are_not_there(self):
    self.base['embed.weight'] = self.disk.random(10, 4)
    new = {'embed.token_adapter.trainable_tokens_delta': self.disk.random(1, 4)}
    self.refused('do not fit', new, trainable_token_indices=[10])

  def test_an_empty_file(self):
    self.refused('holds no tensor', {})

  def test_factors_are_not_merged(self):
    path = self.disk.adapter(self.pair)
    with self.assertRaisesRegex(mj.UserError, 'is an adapter, not a model'):
      mj.merge([path, path], 'linear')

  def test_no_adapter_at_all(self):
    base = self.disk.model(self.base)
    recipe = {'merge_method': 'linear', 'models': [f'{base}+{base}']}
    with self.assertRaisesRegex(mj.UserError, 'is no adapter'):
      mj.plan(recipe)


class BesideTest(absltest.TestCase):
  def test_an_adapter_left_beside_a_model_is_left_out(self):
    disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    leaves = {KERNEL: disk.random(6, 4)}
    path = disk.adapter(
      {f'{Q}.lora_A.weight': disk.random(2, 4), f'{Q}.lora_B.weight': disk.random(6, 2)}
    )  # fmt: skip
    model = disk.path / 'adapter'
    # An adapter with a configuration beside it, as some trainers write, is one.
    (model / 'config.json').write_text('{}')
    base = disk.model(leaves)
    plan = mj.plan(
      {'merge_method': 'linear', 'base_model': base, 'models': [path]}
    )
    self.assertIn(path, str(plan.recipe.models()))
    with self.assertRaisesRegex(mj.UserError, 'is an adapter'):
      mj.plan({'merge_method': 'linear', 'models': [path]})
    mj.save_checkpoint(disk.path / 'part', leaves, 'safetensors')
    for file in (disk.path / 'part').iterdir():
      file.rename(model / file.name)
    index = {'weight_map': {KERNEL: 'model.safetensors'}}
    (model / 'model.safetensors.index.json').write_text(json.dumps(index))
    plan = mj.plan({'merge_method': 'linear', 'models': [path]})
    self.assertIn(
      'with an adapter beside it, which is left out', plan.describe()
    )
    both = mj.plan(
      {'merge_method': 'linear', 'models': [f'{path}+{path}']}
    ).describe()
    self.assertNotIn('left out', both)
    mj.execute(plan, disk.path / 'out')
    got = mj.open_checkpoint(disk.path / 'out')
    np.testing.assert_array_equal(got.leaves([KERNEL])[KERNEL], leaves[KERNEL])
    self.assertLen(got.specs(), 1)


if __name__ == '__main__':
  absltest.main()
