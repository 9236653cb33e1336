# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Of a directory, the files that transformers would load are the model."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.checkpoints import safetensors


class ShardsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def put(self, **arrays):
    """Files by stem, each of one array of the given name."""
    for file, name in arrays.items():
      leaves = {name: np.full(2, len(name), np.float32)}
      safetensors.write(self.folder / f'{file}.safetensors', leaves)

  def index(self, name='model.safetensors.index.json', **weight_map):
    text = json.dumps({'weight_map': weight_map})
    (self.folder / name).write_text(text)

  def opened(self):
    store = mj.open_checkpoint(self.folder)
    store.read()
    return sorted(store.specs()), store.provenance.get('left_out', [])

  @parameterized.parameters(
    'consolidated', 'model.fp16', 'adapter_model', 'model-00001-of-00002',
    'pytorch_lora_weights',
  )  # fmt: skip
  def test_the_single_file_of_a_model_is_all_of_it(self, stray):
    self.put(**{'model': 'w', stray: 'v'})
    self.assertEqual(self.opened(), (['w'], [f'{stray}.safetensors']))

  def test_a_copy_of_the_same_weights_is_not_a_double(self):
    self.put(**{'model': 'w', 'model.fp16': 'w'})
    self.assertEqual(self.opened(), (['w'], ['model.fp16.safetensors']))

  def test_an_index_names_the_files(self):
    self.put(x='w', y='v', consolidated='u')
    self.index(w='x.safetensors', v='y.safetensors')
    self.assertEqual(self.opened(), (['v', 'w'], ['consolidated.safetensors']))

  def test_the_single_file_comes_before_an_index(self):
    # As `from_pretrained` looks for them.
    self.put(model='w', x='v')
    self.index(v='x.safetensors')
    self.assertEqual(self.opened(), (['w'], ['x.safetensors']))

  def test_an_index_of_another_name_is_taken_if_it_is_the_only_one(self):
    self.put(**{'diffusion-1': 'w', 'other': 'v'})
    self.index('diffusion.safetensors.index.json', w='diffusion-1.safetensors')
    self.assertEqual(self.opened(), (['w'], ['other.safetensors']))

  @parameterized.parameters(
    ('model-00001-of-00002', 'model-00002-of-00002'),
    ('w_0_of_2', 'w_1_of_2'),
    ('x-00001-of-00002.fp16', 'x-00002-of-00002.fp16'),
  )
  def test_complete_shards_need_no_index(self, first, second):
    self.put(**{first: 'w', second: 'v', 'consolidated': 'u'})
    self.assertEqual(self.opened(), (['v', 'w'], ['consolidated.safetensors']))

  def test_shards_of_the_model_come_before_others(self):
    self.put(**{
      'model-00001-of-00001': 'w', 'consolidated-00001-of-00001': 'u',
    })  # fmt: skip
    self.assertEqual(self.opened()[0], ['w'])

  def test_a_missing_shard_is_told(self):
    self.put(**{'model-00001-of-00003': 'w', 'model-00003-of-00003': 'v'})
    with self.assertRaisesRegex(mj.UserError, '2 of 3 shards; number 2 is'):
      mj.open_checkpoint(self.folder)
    # One shard of two is not a single file, which would be the model.
    (self.folder / 'model-00003-of-00003.safetensors').unlink()
    with self.assertRaisesRegex(mj.UserError, 'number 2, 3 is'):
      mj.open_checkpoint(self.folder)

  def test_an_index_without_its_files_is_told(self):
    self.index(w='x.safetensors')
    with self.assertRaisesRegex(
      mj.UserError, 'x.safetensors, which is missing'
    ):
      mj.open_checkpoint(self.folder)

  def test_a_single_file_of_any_name_is_the_model(self):
    self.put(consolidated='w')
    self.assertEqual(self.opened(), (['w'], []))

  def test_a_pickle_beside_other_files_is_the_model(self):
    self.put(adapter_model='w')
    (self.folder / 'pytorch_model-00001-of-00002.bin').write_bytes(b'')
    with self.assertRaisesRegex(mj.UserError, 'is pytorch_model.*a pickle'):
      mj.open_checkpoint(self.folder)
    self.put(model='v')
    self.assertEqual(self.opened(), (['v'], ['adapter_model.safetensors']))

  def test_several_files_without_an_index_are_a_question(self):
    self.put(encoder='w', decoder='v')
    with self.assertRaisesRegex(mj.UserError, 'which ones are the model'):
      mj.open_checkpoint(self.folder)
    store = mj.open_checkpoint(self.folder / 'encoder.safetensors')
    self.assertEqual(list(store.specs()), ['w'])

  def test_a_plan_says_what_it_leaves_out(self):
    self.put(model='w', consolidated='u')
    models = [{'model': str(self.folder)}]
    plan = mj.plan({'merge_method': 'linear', 'models': models})
    self.assertEqual([task.path for task in plan.tasks], ['w'])
    self.assertIn('not merged: consolidated.safetensors', plan.describe())


if __name__ == '__main__':
  absltest.main()
