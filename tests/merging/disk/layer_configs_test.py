# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `config.json` says of layers that were chosen and stacked."""

from absl.testing import absltest
from absl.testing import parameterized

from mergejax.merging.disk import layer_configs


class LayerConfigsTest(parameterized.TestCase):
  def changes(self, config, order, count, module='default', other=None, side=0):
    configs = {'a': config, 'b': other or config}
    stack = layer_configs.Stack(
      module, tuple(order), {'a': count, 'b': count}, side
    )
    found, remarks = layer_configs.changes('a', configs, stack)
    return layer_configs.changed(config, found), remarks

  def test_lists_of_one_entry_a_layer(self):
    config = {
      'num_hidden_layers': 3,
      'layer_types': ['full', 'sliding', 'linear'],
      'no_rope_layers': [1, 1, 0],
      'num_key_value_heads': [1, 2, 4],
      'hybrid_override_pattern': 'M*-',
      'mlp_only_layers': [0, 2],
      'eos_token_id': [7, 8, 9],
      'architectures': ['A', 'B', 'C'],
      'mrope_section': [1, 2, 3],
    }
    other = {**config, 'layer_types': ['x', 'y', 'z'], 'mlp_only_layers': []}
    order = [('a', 2), ('a', 0), ('b', 1), ('a', 2)]
    got, _ = self.changes(config, order, 3, other=other)
    self.assertEqual(got, {
      **config,
      'num_hidden_layers': 4,
      'layer_types': ['linear', 'full', 'y', 'linear'],
      'no_rope_layers': [0, 1, 1, 0],
      'num_key_value_heads': [4, 1, 2, 4],
      'hybrid_override_pattern': '-M*-',
      'mlp_only_layers': [0, 1, 3],
    })  # fmt: skip

  def test_a_source_that_does_not_say_has_what_the_reference_has_there(self):
    config = {'num_hidden_layers': 3, 'layer_types': ['x', 'y', 'z']}
    order = [('b', 1), ('a', 0), ('b', 2)]
    other = {'num_hidden_layers': 3}
    got, _ = self.changes(config, order, 3, other=other)
    self.assertEqual(got['layer_types'], ['y', 'x', 'z'])

  def test_kinds_of_layers_that_are_not_written(self):
    # Gemma 2 alternates, beginning with a sliding window.
    config = {'model_type': 'gemma2', 'num_hidden_layers': 4}
    got, remarks = self.changes(config, [('a', 1), ('a', 2), ('a', 3)], 4)
    full, sliding = 'full_attention', 'sliding_attention'
    self.assertEqual(got['layer_types'], [full, sliding, full])
    self.assertEqual(remarks, [])
    config = {'num_hidden_layers': 4, 'max_window_layers': 2}
    _, remarks = self.changes(config, [('a', 1), ('a', 2)], 4)
    self.assertIn('max_window_layers: 2', remarks[0])
    _, remarks = self.changes(config, [('a', 0), ('a', 1)], 4)
    self.assertEqual(remarks, [])
    config = {**config, 'use_sliding_window': False}
    _, remarks = self.changes(config, [('a', 1), ('a', 2)], 4)
    self.assertEqual(remarks, [])

  @parameterized.parameters(
    ({'num_layers': 4}, 'encoder', {'num_layers': 2, 'num_decoder_layers': 4}),
    ({'num_layers': 4}, 'decoder', {'num_layers': 4, 'num_decoder_layers': 2}),
    ({'encoder_layers': 4, 'decoder_layers': 4, 'num_hidden_layers': 4},
     'encoder',
     {'encoder_layers': 2, 'decoder_layers': 4, 'num_hidden_layers': 2}),
    ({'encoder_layers': 4, 'decoder_layers': 4, 'num_hidden_layers': 4},
     'decoder',
     {'encoder_layers': 4, 'decoder_layers': 2, 'num_hidden_layers': 4}),
    ({'num_hidden_layers': 4, 'vision_config': {'depth': 4}}, 'text_decoder',
     {'num_hidden_layers': 2, 'vision_config': {'depth': 4}}),
    ({'text_config': {'num_hidden_layers': 4}, 'vision_config': {'depth': 4}},
     'vision_tower',
     {'text_config': {'num_hidden_layers': 4}, 'vision_config': {'depth': 2}}),
    ({'n_layer': 4}, 'default', {'n_layer': 2}),
    ({'text_config': {'num_hidden_layers': 4}}, 'default',
     {'text_config': {'num_hidden_layers': 2}}),
  )  # fmt: skip
  def test_where_the_number_of_layers_stands(self, config, module, expected):
    order = [('a', 0), ('a', 1)]
    got, remarks = self.changes(config, order, 4, module, side=4)
    self.assertEqual(got, expected)
    self.assertEqual(remarks, [])

  def test_a_number_that_stands_nowhere_is_told(self):
    got, remarks = self.changes({'depths': 3}, [('a', 0)], 3)
    self.assertEqual(got, {'depths': 3})
    self.assertIn('the result has 1', remarks[0])


if __name__ == '__main__':
  absltest.main()
