# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of several stacks: modules, slices and gradients over one of them."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.core import tree as tree_lib
from mergejax.names import modules

WIDTH = 3


def _model(rng, stacks, ends):
  """Layers of two leaves in each stack, and what stands outside of them."""
  names = [
    f'{stem}.{i}.{leaf}.weight'
    for stem, count in stacks.items()
    for i in range(count)
    for leaf in ('attn', 'mlp')
  ]
  return {
    name: rng.normal(
      size=(WIDTH,) if 'norm' in name else (WIDTH, WIDTH)
    ).astype(np.float32)
    for name in (*names, *ends)
  }


TEXT, VISION = (
  'model.language_model.layers',
  'model.vision_tower.encoder.layers',
)
VL_ENDS = (
  'model.language_model.embed_tokens.weight',
  'model.language_model.norm.weight',
  'lm_head.weight',
  'model.multi_modal_projector.linear_1.weight',
  'model.vision_tower.embeddings.patch.weight',
  'model.vision_tower.post_layernorm.weight',
)
VL_CONFIG = {
  'architectures': ['Gemma3ForConditionalGeneration'],
  'model_type': 'gemma3',
  'tie_word_embeddings': False,
  'text_config': {
    'model_type': 'gemma3_text',
    'num_hidden_layers': 4,
    'layer_types': ['a', 'b', 'c', 'd'],
  },
  'vision_config': {'num_hidden_layers': 2, 'layer_types': ['v', 'w']},
}
T5_ENDS = (
  'shared.weight',
  'encoder.final_layer_norm.weight',
  'decoder.final_layer_norm.weight',
)


class LayoutTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.rng = np.random.default_rng(0)
    self.models = {}

  def save(self, name, model, config):
    self.models[name] = model
    path = self.folder / name
    mj.save_checkpoint(path, model, 'safetensors', config=config)
    return str(path)

  def vision_language(self, *names):
    return [
      self.save(name, _model(self.rng, {TEXT: 4, VISION: 2}, VL_ENDS), VL_CONFIG)
      for name in names
    ]  # fmt: skip

  def t5(self, *names):
    made = []
    for name in names:
      stacks = {'encoder.block': 3, 'decoder.block': 2}
      model = {
        path.replace('.attn', '.layer.0.attn').replace('.mlp', '.layer.1.mlp'): leaf
        for path, leaf in _model(self.rng, stacks, T5_ENDS).items()
      }  # fmt: skip
      for side in ('encoder', 'decoder'):
        positions = (
          f'{side}.block.0.layer.0.attn.relative_attention_bias.weight'
        )
        model[positions] = self.rng.normal(size=(4, 2)).astype(np.float32)
      config = {'model_type': 't5', 'num_layers': 3, 'num_decoder_layers': 2}
      made.append(self.save(name, model, config))
    return made

  def merged(self, recipe):
    plan = mj.plan(recipe)
    mj.execute(plan, self.folder / 'out')
    config = json.loads((self.folder / 'out' / 'config.json').read_text())
    leaves = tree_lib.flatten(mj.open_checkpoint(self.folder / 'out').read())
    return leaves, config, plan.describe()

  def mean(self, path, weights=(0.5, 0.5)):
    return sum(w * self.models[n][path] for n, w in zip('ab', weights))

  def test_slices_choose_from_the_language_model(self):
    a, b = self.vision_language('a', 'b')
    recipe = {
      'merge_method': 'passthrough',
      'slices': [
        {'sources': [{'model': a, 'layer_range': [0, 2]}]},
        {'sources': [{'model': b, 'layer_range': [1, 4]}]},
      ],
    }
    leaves, config, text = self.merged(recipe)
    order = [('a', 0), ('a', 1), ('b', 1), ('b', 2), ('b', 3)]
    expected = {
      f'{TEXT}.{i}.{leaf}.weight': self.models[m][f'{TEXT}.{j}.{leaf}.weight']
      for i, (m, j) in enumerate(order)
      for leaf in ('attn', 'mlp')
    }
    for path, leaf in self.models['a'].items():
      if not path.startswith(TEXT):
        expected[path] = leaf
    for path in ('model.language_model.norm.weight', 'lm_head.weight'):
      expected[path] = self.models['b'][path]
    self.assertCountEqual(leaves, expected)
    for path, leaf in expected.items():
      np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    self.assertEqual(config['text_config']['num_hidden_layers'], 5)
    self.assertEqual(config['text_config']['layer_types'], list('abbcd'))
    self.assertEqual(config['vision_config'], VL_CONFIG['vision_config'])
    self.assertIn('5 layers of model.language_model.layers in 2 slices', text)
    self.assertIn(VISION, text)

  def test_modules(self):
    a, b = self.vision_language('a', 'b')
    both = lambda *weights: [
      {'model': m, 'parameters': {'weight': w}} for m, w in zip((a, b), weights)
    ]
    recipe = {
      'merge_method': 'linear',
      'modules': {
        'text_decoder': {
          'slices': [{'sources': [
            {'model': a, 'layer_range': [0, 2]},
            {'model': b, 'layer_range': [2, 4]},
          ]}],
        },
        'vision_tower': {'models': both([0, 1], [1, 0])},
      },
      'parameters': {'weight': 1},
    }  # fmt: skip
    leaves, config, text = self.merged(recipe)
    for i in range(2):
      for leaf in ('attn', 'mlp'):
        path = f'{TEXT}.{i}.{leaf}.weight'
        there = f'{TEXT}.{i + 2}.{leaf}.weight'
        expected = (self.models['a'][path] + self.models['b'][there]) / 2
        np.testing.assert_allclose(leaves[path], expected, atol=1e-6)
        path = f'{VISION}.{i}.{leaf}.weight'
        np.testing.assert_array_equal(leaves[path], self.models['ab'[i == 0]][path])  # fmt: skip
    self.assertNotIn(f'{TEXT}.2.mlp.weight', leaves)
    for path in ('lm_head.weight', 'model.language_model.embed_tokens.weight'):
      np.testing.assert_allclose(leaves[path], self.mean(path), atol=1e-6)
    projector = 'model.multi_modal_projector.linear_1.weight'
    np.testing.assert_array_equal(
      leaves[projector], self.models['a'][projector]
    )
    self.assertIn('no module covers 1 parameters', text)
    self.assertEqual(config['text_config']['num_hidden_layers'], 2)
    self.assertEqual(config['text_config']['layer_types'], ['a', 'b'])
    self.assertEqual(config['vision_config']['num_hidden_layers'], 2)

  def test_a_module_of_the_base_alone_is_the_base_s(self):
    a, b = self.vision_language('a', 'b')
    recipe = {
      'merge_method': 'slerp',
      'base_model': a,
      'parameters': {'t': 1},
      'modules': {
        'text_decoder': {'models': [a, b]},
        'vision_tower': {'models': [a]},
        'multi_modal_projector': {'models': [b]},
      },
    }
    leaves, _, _ = self.merged(recipe)
    for path, leaf in leaves.items():
      model = 'a' if 'vision_tower' in path else 'b'
      np.testing.assert_allclose(leaf, self.models[model][path], atol=1e-6)

  def test_settings_of_a_module_stand_between_slice_and_recipe(self):
    a, b = self.vision_language('a', 'b')
    sources = [{'model': m, 'layer_range': [0, 4]} for m in (a, b)]
    sources[1]['parameters'] = {'weight': [{'filter': 'mlp', 'value': 3}]}
    recipe = {
      'merge_method': 'linear',
      'modules': {
        'text_decoder': {
          'slices': [{
            'sources': sources,
            'parameters': {'weight': [{'filter': 'attn', 'value': [1, 2]}]},
          }],
          'parameters': {'weight': 1},
        },
        'model.vision_tower': {'models': [a, b]},
        'default': {'models': [a]},
      },
      'parameters': {'weight': 5, 'normalize': False},
    }  # fmt: skip
    leaves, _, _ = self.merged(recipe)
    for path, leaf in leaves.items():
      w = (5, 0) if 'projector' in path else (5, 5)
      if TEXT in path:
        depth = int(path.split('.')[3]) / 3
        w = (1, 3) if 'mlp' in path else (1 + depth, 1 + depth)
      elif 'language_model' in path or 'lm_head' in path:
        w = (1, 1)
      np.testing.assert_allclose(leaf, self.mean(path, w), atol=1e-5, err_msg=path)  # fmt: skip

  def test_the_encoder_or_the_decoder_of_t5(self):
    a, b = self.t5('a', 'b')
    slices = [
      {'sources': [{'model': m, 'layer_range': r}]}
      for m, r in ((a, [1, 3]), (b, [0, 3]))
    ]
    with self.assertRaisesRegex(
      mj.UserError, '(?s)found .*decoder.block.*encoder: {slices'
    ):
      mj.plan({'merge_method': 'passthrough', 'slices': slices})
    recipe = {
      'merge_method': 'passthrough',
      'modules': {
        'encoder': {'slices': slices},
        'decoder': {'models': [a]},
        'shared': {'models': [b]},
      },
    }
    leaves, config, _ = self.merged(recipe)
    self.assertEqual(
      (config['num_layers'], config['num_decoder_layers']), (5, 2)
    )
    for path, (model, source) in {
      'encoder.block.1.layer.0.attn.weight': ('a', 2),
      # The result has one table of relative positions, in its first layer.
      'encoder.block.0.layer.0.attn.relative_attention_bias.weight': ('a', 0),
      'encoder.block.2.layer.0.attn.weight': ('b', 0),
      'encoder.block.4.layer.1.mlp.weight': ('b', 2),
      'decoder.block.1.layer.1.mlp.weight': ('a', 1),
    }.items():
      there = '.'.join(
        [*path.split('.')[:2], str(source), *path.split('.')[3:]]
      )
      np.testing.assert_array_equal(leaves[path], self.models[model][there])
    tables = [p for p in leaves if 'encoder' in p and 'relative' in p]
    self.assertLen(tables, 1)
    np.testing.assert_array_equal(leaves['shared.weight'], self.models['b']['shared.weight'])  # fmt: skip

  def test_gradients_run_over_the_blocks_of_t5(self):
    a, b = self.t5('a', 'b')
    recipe = {
      'merge_method': 'linear',
      'models': [
        {'model': a, 'parameters': {'weight': [1, 0]}},
        {'model': b, 'parameters': {'weight': [0, 1]}},
      ],
    }
    leaves, _, _ = self.merged(recipe)
    for side, count in (('encoder', 3), ('decoder', 2)):
      for i in range(count):
        depth = i / (count - 1)
        for leaf in ('layer.0.attn', 'layer.1.mlp'):
          path = f'{side}.block.{i}.{leaf}.weight'
          np.testing.assert_allclose(
            leaves[path], self.mean(path, (1 - depth, depth)), atol=1e-6
          )

  @parameterized.parameters(
    'Transformer/encoderblock_{}/MlpBlock_3/Dense_0/kernel',
    'EncoderBlock_{}/Dense_0/kernel',
    'transformer/layer_{}/mlp/kernel',
    'decoder/layers_{}/mlp/wi/kernel',
    'encoder/res_block_{}/kernel',
    'model/h/{}/mlp/kernel',
  )
  def test_gradients_run_over_the_blocks_of_flax(self, name):
    paths = {name.format(i): i / 2 for i in range(3)} | {'head/kernel': 0.0}
    for k, model in enumerate('ab'):
      leaves = {path: np.full((2, 2), k, np.float32) for path in paths}
      mj.save_checkpoint(self.folder / f'{model}.npz', leaves)
    recipe = {'merge_method': 'linear', 'models': [
      {'model': str(self.folder / 'a.npz'), 'parameters': {'weight': [1, 0]}},
      {'model': str(self.folder / 'b.npz'), 'parameters': {'weight': [0, 1]}},
    ]}  # fmt: skip
    weights = {task.path: task.weights for task in mj.plan(recipe).tasks}
    self.assertEqual(weights, {p: (1 - d, d) for p, d in paths.items()})

  def test_a_gradient_without_layers_is_refused(self):
    kernel = np.zeros((3, 2, 2), np.float32)
    mj.save_checkpoint(self.folder / 'a.npz', {'layers/mlp/kernel': kernel})
    path = str(self.folder / 'a.npz')
    for weight in ([1, 0], [{'filter': 'mlp', 'value': [1, 0]}, {'value': 1}]):
      own = {'model': path, 'parameters': {'weight': weight}}
      with self.assertRaisesRegex(
        mj.UserError, 'no parameter is in a numbered'
      ):
        mj.plan({'merge_method': 'linear', 'models': [own]})
    own['parameters'] = {'weight': [1, 1]}
    mj.plan({'merge_method': 'linear', 'models': [own]})

  def test_a_model_merged_with_its_own_layers(self):
    (a,) = self.vision_language('a')
    recipe = {
      'merge_method': 'linear',
      'slices': [{'sources': [
        {'model': a, 'layer_range': [0, 2], 'parameters': {'weight': 1}},
        {'model': a, 'layer_range': [2, 4], 'parameters': {'weight': 3}},
      ]}],
    }  # fmt: skip
    leaves, _, _ = self.merged(recipe)
    path, there = f'{TEXT}.1.mlp.weight', f'{TEXT}.3.mlp.weight'
    a = self.models['a']
    np.testing.assert_allclose(leaves[path], a[path] / 4 + a[there] * 0.75, atol=1e-6)  # fmt: skip

  def test_leaves_that_only_some_have_are_not_dropped(self):
    a, b = self.vision_language('a', 'b')
    more = dict(self.models['b'])
    for name in (f'{TEXT}.1.attn.bias', 'model.language_model.extra.weight'):
      more[name] = np.ones(WIDTH, np.float32)
    c = self.save('c', more, VL_CONFIG)
    sources = [{'model': m, 'layer_range': [0, 4]} for m in (a, c)]
    recipe = {'merge_method': 'linear', 'slices': [{'sources': sources}]}
    recipe['parameters'] = {'weight': 1}
    with self.assertRaises(mj.UserError) as caught:
      mj.plan(recipe)
    for words in (f'a lacks {TEXT}.1.attn.bias', 'c has model.language_model.extra'):  # fmt: skip
      self.assertIn(words, caught.exception.message)
    recipe['rules'] = [{'match': r'.*(bias|extra\.weight)', 'copy': c}]
    leaves, _, _ = self.merged(recipe)
    np.testing.assert_array_equal(leaves[f'{TEXT}.1.attn.bias'], 1)
    np.testing.assert_array_equal(
      leaves['model.language_model.extra.weight'], 1
    )
    path = f'{TEXT}.1.attn.weight'
    np.testing.assert_allclose(leaves[path], self.mean(path), atol=1e-6)

  @parameterized.parameters(
    ({'text_decodr': {'models': ['a']}}, "Did you mean 'text_decoder'"),
    ({'text_decoder': {'model': ['a']}}, "unknown key 'model'"),
    ({'text_decoder': {'slices': [{'sources': [
        {'model': 'a', 'layer_range': [2, 6]}]}]}}, 'has layers 0 to 3'),
    ({'multi_modal_projector': {'slices': [{'sources': [
        {'model': 'a', 'layer_range': [0, 1]}]}]}}, 'found \\[\\]'),
    ('text_decoder', '`key: value` lines'),
  )  # fmt: skip
  def test_mistakes_in_modules(self, modules, words):
    self.vision_language('a')
    text = json.dumps({'merge_method': 'linear', 'modules': modules})
    text = text.replace('"a"', json.dumps(str(self.folder / 'a')))
    with self.assertRaisesRegex(mj.UserError, words):
      mj.plan(json.loads(text))

  def test_modules_and_models_are_not_given_together(self):
    (a,) = self.vision_language('a')
    recipe = {'merge_method': 'linear', 'models': [a], 'modules': {'text_decoder': {'models': [a]}}}  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, "one of 'models', 'slices'"):
      mj.plan(recipe)

  @parameterized.parameters(
    ('visual.blocks.0.attn.qkv.weight', 'vision_tower'),
    ('visual.merger.mlp.0.weight', 'multi_modal_projector'),
    ('model.visual.deepstack_merger_list.1.norm.weight', 'multi_modal_projector'),
    ('vision_model.transformer.layers.0.w', 'vision_tower'),
    ('audio_tower.layers.0.w', 'audio_tower'),
    ('model.layers.0.mlp.up_proj.weight', 'text_decoder'),
    ('lm_head.weight', 'text_decoder'),
  )  # fmt: skip
  def test_names_of_modules(self, path, module):
    paths = [path, 'visual.patch_embed.proj.weight']
    self.assertEqual(modules.module_names(paths)(path), module)


if __name__ == '__main__':
  absltest.main()
