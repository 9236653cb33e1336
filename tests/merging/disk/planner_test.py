# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans: what is merged with what, and mistakes that are all told at once."""

import json
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import models_on_disk
import numpy as np
import yaml

import mergejax as mj
from mergejax.core import errors


class PlanTest(models_on_disk.TestCase):
  def test_gradients_and_filters_along_the_layers(self):
    recipe = self.recipe()
    recipe['models'][0]['parameters'] = {'weight': [0.25, 1]}
    recipe['models'][1]['parameters'] = {
      'weight': [{'filter': 'mlp', 'value': 0}, {'value': 1}]
    }
    merged = self.merged(recipe)
    a, b = self.models['a'], self.models['b']
    for path, leaf in merged.items():
      depth = 0.0  # as in mergekit, for the final norm and head too
      if '.layers.' in path:
        depth = int(path.split('.')[2]) / 2
      w = [0.25 + 0.75 * depth, 0.0 if 'mlp' in path else 1.0]
      expected = (w[0] * a[path] + w[1] * b[path]) / sum(w)
      np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=path)

  def test_weights_that_cancel_are_told_with_the_parameter(self):
    recipe = self.recipe()
    for entry, w in zip(recipe['models'], (1, -1)):
      entry['parameters'] = {'weight': [{'filter': 'mlp', 'value': w}, {'value': 1}]}  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, r'down_proj.*sum to zero'):
      mj.plan(recipe)

  def test_slices_stack_layers(self):
    recipe = {
      'merge_method': 'passthrough',
      'slices': [
        {'sources': [{'model': self.path('a'), 'layer_range': [0, 2]}]},
        {'sources': [{'model': self.path('b'), 'layer_range': [1, 3]}]},
      ],
    }
    merged = self.merged(recipe)
    expected = {}
    for out, (model, layer) in enumerate(
      (('a', 0), ('a', 1), ('b', 1), ('b', 2))
    ):
      for path, leaf in self.models[model].items():
        if path.startswith(f'model.layers.{layer}.'):
          new = path.replace(f'.{layer}.', f'.{out}.', 1)
          expected[new] = leaf
    expected['model.embed_tokens.weight'] = self.models['a'][
      'model.embed_tokens.weight'
    ]
    for path in ('model.norm.weight', 'lm_head.weight'):
      expected[path] = self.models['b'][path]
    self.assertCountEqual(merged, expected)
    for path, leaf in expected.items():
      np.testing.assert_array_equal(merged[path], leaf)
    config = json.loads((self.folder / 'out' / 'config.json').read_text())
    self.assertEqual(config['num_hidden_layers'], 4)

  def test_slices_with_a_base_and_two_sources(self):
    recipe = {
      'merge_method': 'slerp',
      'base_model': self.path('a'),
      'slices': [{'sources': [
        {'model': self.path('a'), 'layer_range': [0, 3]},
        {'model': self.path('b'), 'layer_range': [0, 3]},
      ]}],
      'parameters': {'t': [{'filter': 'mlp', 'value': [0, 1]}, {'value': 0.5}]},
    }  # fmt: skip
    merged = self.merged(recipe)
    for path, leaf in merged.items():
      if '.mlp.' in path and '.layers.0.' in path:
        np.testing.assert_array_equal(leaf, self.models['a'][path])
      if '.mlp.' in path and '.layers.2.' in path:
        np.testing.assert_array_equal(leaf, self.models['b'][path])
    expected = mj.merge(
      [self.models['b']], 'slerp', base=self.models['a'], t=0.5
    )
    np.testing.assert_allclose(
      merged['model.norm.weight'], expected['model.norm.weight'], rtol=1e-5
    )

  def test_rules(self):
    recipe = self.recipe(
      'task_arithmetic',
      base='base',
      rules=[
        {'match': r'.*norm.*', 'copy': 'base'},
        {'match': r'lm_head.*', 'copy': self.path('b')},
        {'match': r'.*up_proj.*', 'method': 'linear'},
        {'match': r'.*down_proj.*', 'parameters': {'lambda': 0.5}},
      ],
    )
    merged = self.merged(recipe)
    m = self.models
    for path, leaf in merged.items():
      delta = m['a'][path] + m['b'][path] - 2 * m['base'][path]
      if 'norm' in path:
        expected = m['base'][path]
      elif 'lm_head' in path:
        expected = m['b'][path]
      elif 'up_proj' in path:
        expected = (m['a'][path] + m['b'][path]) / 2
      else:
        expected = m['base'][path] + (0.5 if 'down' in path else 1) * delta
      np.testing.assert_allclose(leaf, expected, atol=1e-5, err_msg=path)
    recipe['rules'].append({'match': 'nothing'})
    with self.assertRaisesRegex(
      mj.UserError, "rule 4 .'nothing'. is the first"
    ):
      mj.plan(recipe)

  def test_sixteen_bit_integers_are_copied(self):
    ids = np.array([0x7FFF, -1, 0x7F80], np.int16)
    for name in ('a', 'b'):
      models_on_disk.save(self.folder / name, {**self.models[name], 'ids': ids})
    np.testing.assert_array_equal(self.merged(self.recipe())['ids'], ids)

  def test_a_copy_that_does_not_exist(self):
    recipe = {
      'merge_method': 'passthrough',
      'slices': [
        {'sources': [{'model': self.path('a'), 'layer_range': [0, 3]}]},
        {'sources': [{'model': self.path('a'), 'layer_range': [0, 3]}]},
      ],
      'rules': [{'match': '.*layers.5.*', 'copy': self.path('b')}],
    }
    with self.assertRaisesRegex(
      mj.UserError, 'cannot be copied from .*lacks it'
    ):
      mj.plan(recipe)

  def test_chat_template(self):
    settings_file = self.folder / 'a' / 'tokenizer_config.json'
    settings_file.write_text('{"chat_template": "{{ a }}", "bos": 1}')
    for given, expected in (('auto', '{{ a }}'), ('{{ b }}', '{{ b }}')):
      out = f'out-{len(given)}'
      self.merged(self.recipe(chat_template=given), out)
      saved = json.loads(
        (self.folder / out / 'tokenizer_config.json').read_text()
      )
      self.assertEqual(saved, {'chat_template': expected, 'bos': 1})

  def test_the_base_may_be_listed_among_the_models(self):
    with_it = self.recipe('ties', ('base', 'a', 'b'), base='base')
    without = self.recipe('ties', ('a', 'b'), base='base')
    a, b = self.merged(with_it, 'x'), self.merged(without, 'y')
    for path, leaf in a.items():
      np.testing.assert_array_equal(leaf, b[path])

  def test_mergekit_defaults_are_printed(self):
    text = mj.plan(self.recipe('ties', base='base')).describe()
    self.assertIn('density=1.0', text)
    self.assertIn('trim_scope=tensor', text)

  def test_peak_memory_does_not_grow_with_the_number_of_layers(self):
    rng = np.random.default_rng(0)
    peaks = []
    for layers in (2, 20):
      for name in 'xyz':
        models_on_disk.save(
          self.folder / name, models_on_disk.llama(rng, layers=layers)
        )
      plan = mj.plan(self.recipe('ties', ('x', 'y'), base='z'))
      peaks.append(plan.peak_bytes)
    self.assertEqual(*peaks)

  @parameterized.parameters(
    ('linear', True), ('task_arithmetic', True), ('dare_linear', False),
    ('ties', False),
  )  # fmt: skip
  def test_a_stack_is_held_whole_only_where_its_layers_matter(
    self, method, in_pieces
  ):
    name = 'model.layers.0.mlp.experts.gate_up_proj'
    for path in 'xyz':
      mj.save_checkpoint(
        self.folder / path, {name: np.ones((2, 3, 4), np.float32)},
        'safetensors', config={'model_type': 'gpt_oss'},
      )  # fmt: skip
    plan = mj.plan(self.recipe(method, ('x', 'y'), base='z'))
    (task,) = plan.tasks
    self.assertEqual(task.spec.axes, ('expert', 'inputs', 'outputs'))
    self.assertEqual(task.in_pieces, in_pieces)

  def test_the_first_rule_of_axes_that_matches_counts(self):
    mj.save_checkpoint(
      self.folder / 'x', {'layers': {'kernel': np.ones((2, 3), np.float32)}},
      'safetensors',
    )  # fmt: skip
    axes = [['layers/.*', ['layers', 'embed']], ['.*kernel', ['embed', 'mlp']]]
    recipe = self.recipe('linear', ('x',))
    (task,) = mj.plan({**recipe, 'axes': axes}).tasks
    self.assertEqual(task.spec.axes, ('layers', 'embed'))

  # Mistakes -------------------------------------------------------------------

  def test_axes_that_match_nothing(self):
    axes = [['.*norm.*', ['embed']], ['layrs.*', ['layers', 'embed']]]
    with self.assertRaisesRegex(
      mj.UserError, "axes: 'layrs.*' matches no"
    ) as caught:
      mj.plan(self.recipe(axes=axes))
    self.assertNotIn('norm', caught.exception.message)

  def test_what_disk_cannot_do_is_told_before(self):
    name = 'model.layers.0.mlp.experts.gate_up_proj'
    rng = np.random.default_rng(0)
    models = [
      {name: rng.normal(size=(2, 3, 4)).astype(np.float32)} for _ in range(3)
    ]
    for path, model in zip('xyz', models):
      mj.save_checkpoint(
        self.folder / path, model, 'safetensors',
        config={'model_type': 'gpt_oss'},
      )  # fmt: skip
    options = dict(trim_scope='global', rescale='l1', density=0.5)
    recipe = self.recipe('ties', ('x', 'y'), base='z', parameters=options)
    with self.assertRaisesRegex(mj.UserError, f'{name}: ties .*mj.merge'):
      mj.plan(recipe)
    stores = [mj.open_checkpoint(self.folder / path) for path in 'xyz']
    mj.merge(stores[:2], 'ties', base=stores[2], **options)
    together = mj.linear()._replace(separable=False)
    with self.assertRaisesRegex(mj.UserError, 'separable=False.*mj.merge'):
      mj.plan(self.recipe(together))

  def test_mistakes_of_one_kind_keep_it(self):
    outside = {'density': 2.0}
    with self.assertRaisesRegex(errors.ConfigError, 'ties: density must be'):
      mj.plan(self.recipe('ties', base='base', parameters=outside))
    with self.assertRaises(errors.CheckpointError):
      mj.plan(self.recipe(names=('a', 'nowhere', 'elsewhere')))
    models_on_disk.save(self.folder / 'a', self.models['a'], hidden_act='gelu')
    models_on_disk.save(self.folder / 'b', self.models['b'], hidden_act='relu')
    with self.assertRaises(errors.StructureError):
      mj.plan(self.recipe())
    with self.assertRaises(errors.RecipeError):
      mj.plan(self.recipe(vocab='pad', tokenizer_source='base'))

  def test_missing_base(self):
    with self.assertRaisesRegex(mj.UserError, 'give `base_model:`'):
      mj.plan(self.recipe('ties'))

  def test_missing_checkpoints_are_all_named(self):
    with self.assertRaises(mj.UserError) as caught:
      mj.plan(self.recipe(names=('a', 'nowhere', 'elsewhere')))
    for name in ('nowhere', 'elsewhere'):
      self.assertIn(name, caught.exception.message)

  def test_wrong_layer_range(self):
    recipe = {
      'merge_method': 'passthrough',
      'slices': [
        {'sources': [{'model': self.path('a'), 'layer_range': [0, 5]}]}
      ],
    }
    with self.assertRaisesRegex(mj.UserError, 'has layers 0 to 2'):
      mj.plan(recipe)

  def test_shape_missing_and_extra_in_one_message(self):
    other = dict(self.models['b'])
    del other['model.norm.weight']
    other['extra.weight'] = np.zeros(3, np.float32)
    other['model.layers.0.mlp.up_proj.weight'] = np.zeros((5, 12), np.float32)
    models_on_disk.save(self.folder / 'b', {'model.norm.weight': np.ones(1, np.float32), **other})  # fmt: skip
    with self.assertRaises(mj.UserError) as caught:
      mj.plan(self.recipe())
    for line in ('! model.norm.weight', '+ extra.weight', 'up_proj.weight [25, 12] expected, [5, 12]'):  # fmt: skip
      self.assertIn(line, caught.exception.message)

  def test_a_pickle_is_refused(self):
    folder = self.folder / 'pickled'
    folder.mkdir()
    (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04anything')
    with self.assertRaisesRegex(mj.UserError, 'a pickle.*Convert it'):
      mj.plan(self.recipe(names=('a', 'pickled')))

  def test_sandbox(self):
    inside = self.folder / 'inside'
    models_on_disk.save(inside / 'a', self.models['a'])
    recipe = {
      'merge_method': 'linear',
      'models': [str(inside / 'a'), str(inside / '..' / 'b')],
    }
    mj.plan(recipe)
    with self.assertRaisesRegex(mj.UserError, 'outside the sandbox'):
      mj.plan(recipe, sandbox=inside)

  def test_command_line_exits_with_2_and_one_message(self):
    from mergejax.cli import main

    file = self.folder / 'r.yaml'
    file.write_text(yaml.safe_dump(self.recipe('dare-ties')))
    self.assertEqual(main.main(['merge', str(file), self.path('out')]), 2)
    file.write_text(yaml.safe_dump(self.recipe()))
    self.assertEqual(
      main.main(['merge', str(file), self.path('out'), '--dry_run']), 0
    )
    self.assertFalse((self.folder / 'out').exists())
    self.assertEqual(main.main(['merge', str(file), self.path('out')]), 0)
    self.assertTrue((self.folder / 'out').exists())

  @parameterized.parameters((errors.Stopped, 143), (KeyboardInterrupt, 130))
  def test_a_stopped_merge_is_not_a_success(self, error, code):
    from mergejax.cli import main
    from mergejax.merging.disk import executor

    file = self.folder / 'r.yaml'
    file.write_text(yaml.safe_dump(self.recipe()))
    command = ['merge', str(file), self.path('out')]
    with mock.patch.object(executor.pieces.Leaf, 'merge', side_effect=error):
      with self.assertRaises(SystemExit) as caught:
        main.main(command)
    self.assertEqual(caught.exception.code, code)
    self.assertFalse((self.folder / 'out').exists())
    self.assertEqual(main.main(command), 0)


if __name__ == '__main__':
  absltest.main()
