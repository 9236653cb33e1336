# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Words of recipes: mistakes, kinds of options, what is ignored, templates."""

import importlib.util
import json
import pathlib
import unittest

from absl.testing import absltest
from absl.testing import parameterized
import models_on_disk
import numpy as np

import mergejax as mj
from mergejax.core import tree as tree_lib
from mergejax.merging.recipes import chat_templates
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.merging.recipes import settings
from mergejax.methods import named


def parsed(method='ties', **parameters):
  return recipe_lib.parse_recipe({
    'merge_method': method, 'base_model': 'c', 'models': ['a', 'b'],
    'parameters': parameters,
  })  # fmt: skip


class MistakesTest(parameterized.TestCase):
  def test_settings(self):
    evaluate = settings.evaluate
    self.assertEqual(evaluate(0.5, 'x', 0.3), 0.5)
    self.assertEqual(evaluate([0, 1], 'x', 0.25), 0.25)
    self.assertEqual(evaluate([1, 0, 4], 'x', 1.0), 4)
    for depth, word in ((0.0, 'a'), (0.4, 'a'), (0.5, 'b'), (1.0, 'c')):
      self.assertEqual(evaluate(['a', 'b', 'c'], 'x', depth), word)
      self.assertIs(evaluate([True, False], 'x', depth), depth < 1)
    filters = [
      {'filter': 'mlp', 'value': [0, 1]},
      {'filter': 'attn', 'value': 3},
      {'value': 7},
    ]
    self.assertEqual(evaluate(filters, 'layers.0.mlp.up', 0.5), 0.5)
    self.assertEqual(evaluate(filters, 'layers.0.attn.q', 0.5), 3)
    self.assertEqual(evaluate(filters, 'norm', 0.5), 7)
    self.assertIsNone(evaluate(filters[:1], 'norm', 0.5))

  @parameterized.parameters(
    ({'merge_method': 'dare-ties', 'models': ['a']}, "Did you mean 'dare_ties'"),
    ({'merge_method': 'ties', 'models': ['a'], 'modls': 1}, "Did you mean 'models'"),
    ({'merge_method': 'ties', 'models': ['a'], 'parameters': {'densty': 1}},
     "Did you mean 'density'"),
    ({'merge_method': 'linear', 'models': ['a'], 'slices': []}, 'and not both'),
    ({'merge_method': 'linear'}, "either 'models' or 'slices'"),
    ({'models': ['a']}, "lacks 'merge_method'"),
    ({'merge_method': 'linear', 'models': [{'parameters': {}}]}, "lacks 'model'"),
    ({'merge_method': 'linear', 'models': ['a'], 'dtype': 'bf16'}, 'dtype'),
    ({'merge_method': 'linear', 'models': ['a'], 'seed': 'x'}, 'whole number'),
    ({'merge_method': 'slerp', 'models': ['a'], 'parameters': {'t': ['x']}},
     'list of numbers'),
    ({'merge_method': 'slerp', 'models': ['a'],
      'parameters': {'t': [{'flter': 'a', 'value': 1}]}}, 'filter: TEXT'),
    ({'merge_method': 'linear', 'slices': [
        {'sources': [{'model': 'a', 'layer_range': [2, 1]}]}]}, 'first < end'),
    ({'merge_method': 'linear', 'slices': [{'sources': [
        {'model': 'a', 'layer_range': [0, 2]},
        {'model': 'b', 'layer_range': [0, 3]}]}]}, 'same number'),
    ({'merge_method': 'linear', 'models': ['a'], 'rules': [{'match': '('}]},
     'not a regular expression'),
    ({'merge_method': 'linear', 'models': ['a'], 'axes': [['(', ['embed']]]},
     'not a regular expression'),
    ({'merge_method': 'linear', 'models': ['a'], 'chat_template': 'chatlm'},
     "Did you mean 'chatml'"),
    ('just text', '`key: value` lines'),
  )  # fmt: skip
  def test_mistakes_teach(self, data, message):
    with self.assertRaisesRegex(mj.UserError, message):
      recipe_lib.parse_recipe(data)

  def test_all_mistakes_at_once(self):
    data = {
      'merge_method': 'dare-ties',
      'models': [{'model': 'a', 'paramters': {}}],
      'dtype': 'float23',
      'seed': 1.5,
    }
    with self.assertRaises(mj.UserError) as caught:
      recipe_lib.parse_recipe(data)
    for word in (
      'dare_ties',
      'parameters',
      'float32',
      'whole number',
      '4 mistakes',
    ):
      self.assertIn(word, caught.exception.message)


class KindsTest(parameterized.TestCase):
  def test_every_option_has_a_kind(self):
    for method in named.METHODS:
      for option in named.METHODS.options(method).values():
        self.assertIn(
          option.kind, ('number', 'whole number', 'flag', 'word'), option
        )
    kinds = {n: o.kind for n, o in named.METHODS.options('karcher').items()}
    self.assertEqual(kinds, {'max_iter': 'whole number', 'tol': 'number'})
    self.assertTrue(named.METHODS.options('ties')['density'].per_model)
    self.assertFalse(named.METHODS.options('ram')['epsilon'].per_model)

  # As mergekit reads them.
  @parameterized.parameters(
    ('ties', 'normalize', 1.0, True), ('ties', 'normalize', 0, False),
    ('ties', 'normalize', 'false', False), ('ties', 'normalize', 'No', False),
    ('ties', 'normalize', 'ON', True), ('ties', 'normalize', '1', True),
    ('ties', 'lambda', '1e-1', 0.1), ('ties', 'lambda', True, 1.0),
    ('ties', 'lambda', 2, 2), ('ties', 'rescale', 'true', 'l1'),
    ('ties', 'rescale', 0, 'none'), ('dare_ties', 'rescale', 'paper', 'paper'),
    ('karcher', 'max_iter', 10.0, 10), ('karcher', 'max_iter', '10', 10),
    ('karcher', 'max_iter', [7], [7]), ('karcher', 'tol', '1e-9', 1e-9),
    ('nuslerp', 'nuslerp_flatten', 1, True),
    ('nuslerp', 'nuslerp_row_wise', 'yes', 'input_feature'),
    ('nuslerp', 'nuslerp_row_wise', 'no', 'output_unit'),
    ('ties', 'density', ['0', 0.5, True], [0.0, 0.5, 1.0]),
    ('ties', 'normalize', ['no', 1], [False, True]),
    ('ties', 'density', {'filter': 'mlp', 'value': '1'},
     [{'filter': 'mlp', 'value': 1.0}]),
  )  # fmt: skip
  def test_conversions(self, method, option, value, expected):
    (found,) = parsed(method, **{option: value}).parameters.values()
    self.assertEqual(found, expected)
    for one, other in zip(np.atleast_1d(found), np.atleast_1d(expected)):
      self.assertIs(type(one), type(other))

  @parameterized.parameters(
    ('linear', 'weight', 'half', "must be a number, not 'half'"),
    ('linear', 'weight', None, 'must be a number, not None'),
    ('linear', 'weight', float('nan'), 'must be finite'),
    ('linear', 'weight', 'inf', 'must be finite'),
    ('linear', 'weight', [0, 'much'], "list of numbers; 'much' is not one"),
    ('linear', 'normalize', 'maybe', "true or false, not 'maybe'"),
    ('linear', 'normalize', 2, 'true or false, not 2'),
    ('linear', 'normalize', 0.5, 'true or false, not 0.5'),
    ('karcher', 'max_iter', 10.5, 'whole number, not 10.5'),
    ('karcher', 'max_iter', [1, 9], 'one whole number'),
    ('karcher', 'max_iter', '1e1x', 'whole number'),
    ('karcher', 'max_iter', float('inf'), 'whole number'),
    ('ties', 'trim_scope', 3, 'must be a word, not 3'),
    ('ties', 'rescale', 'l3', "Did you mean .*'l1'"),
    ('ties', 'density', [{'value': {'value': 1}}], 'filter inside a filter'),
    ('ties', 'density', [{'filter': 3, 'value': 1}], 'filter: TEXT'),
  )  # fmt: skip
  def test_what_has_no_meaning_is_told(self, method, option, value, message):
    with self.assertRaisesRegex(mj.UserError, f'{option}: .*{message}'):
      parsed(method, **{option: value})

  def test_all_at_once_with_path_and_key(self):
    data = {
      'merge_method': 'ties', 'base_model': 'c',
      'models': [
        {'model': 'a', 'parameters': {'weight': 'half', 'density': 'most'}},
        {'model': 'b', 'parameters': {'weight': []}},
      ],
      'parameters': {'normalize': 'perhaps', 'lambda': [1, 'x']},
    }  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, '4 mistakes') as caught:
      recipe_lib.parse_recipe(data)
    for line in (
      'parameters of a: weight:',
      'parameters of a: density:',
      'parameters: normalize:',
      'parameters: lambda:',
    ):
      self.assertIn(line, caught.exception.message)

  @parameterized.parameters(
    ('linear', dict(normalize='false'), 'normalize of linear must be true'),
    ('karcher', dict(max_iter=10.0), 'max_iter of karcher must be a whole'),
    ('slerp', dict(t='half'), 't of slerp must be a number'),
    ('ties', dict(trim_scope=1), 'trim_scope of ties must be a word'),
  )
  def test_python_takes_no_words_for_flags(self, method, options, message):
    one = {'w': np.ones(3, np.float32)}
    with self.assertRaisesRegex(mj.UserError, message):
      mj.merge([one, one], method, base=one, **options)


class WordsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'random_words': 1}, "ignored: 'random_words' in recipe"),
    ({'normalize': True}, "'normalize' in recipe.*below `parameters:`"),
    ({'parameters': {'int8_mask': True}}, "'int8_mask' in parameters"),
    ({'parameters': {'t': 0.5}}, "'t' in parameters: linear does not read"),
    ({'parameters': {'flavour': 0.5}}, "'flavour' in parameters: unknown"),
    ({'models': [{'model': 'a', 'layer_range': [0, 1]}]}, "'layer_range' in"),
    ({'models': [{'model': 'a', 'parameters': {'normalize': False}}]},
     "'normalize' in parameters of a: linear takes one for all"),
    ({'models': [{'model': 'a', 'parameters': {'weight': []}}]},
     "'weight' in parameters of a: an empty list"),
    ({'models': [{'model': {'model': 'a', 'override_architecture': 'X'}}]},
     "'override_architecture'"),
    ({'models': ['nowhere@main']}, "nowhere: a folder has no revisions"),
    ({'base_model': 'z'}, 'linear has no use for a base: z gives'),
    ({'base_model': 'z', 'parameters': {'weight': 1}}, 'takes z, the base, as'),
    ({'parameters': {'weight': [0, 1]}}, 'outside of them .* their first'),
    ({'dtype': 'float64'}, 'sums are made in float32'),
  )  # fmt: skip
  def test_what_does_not_count_is_told(self, changes, note):
    recipe = recipe_lib.parse_recipe(
      {'merge_method': 'linear', 'models': ['a'], **changes}
    )
    self.assertRegex('\n'.join(recipe.notes), note)

  @parameterized.parameters(
    ({'parameter': {}}, "Did you mean 'parameters'"),
    ({'rulse': []}, "Did you mean 'rules'"),
    ({'weight': 1}, 'weight belongs below `parameters:`'),
    ({'models': [{'model': 'a', 'weight': 1}]}, 'weight belongs below'),
    ({'parameters': {'wieght': 1}}, "Did you mean 'weight'"),
    ({'parameters': {'trim_scope': 'tensor'}}, "Unknown option of linear"),
    ({'merge_method': 'ties', 'parameters': {'scale': 1}}, 'Write `lambda`'),
    ({'merge_method': 'negate', 'parameters': {'scale': 1, 'lambda': 1}},
     'the same option'),
    ({'dtype': 'int64'}, 'Unknown dtype'),
    ({'rules': 5}, "'rules' must be a list"),
    ({'axes': 'x'}, "'axes' must be a list"),
    ({'tokenizer': 'base'}, "'tokenizer' must be"),
    ({'tokenizer': {}, 'tokenizer_source': 'base'}, 'not both'),
    ({'tokenizer': {'pad_to_multiple_of': 0}}, 'above 0'),
    ({'tokenizer': {'tokens': {'x': {'source': {'kind': 'model_token'}}}}},
     "token 'x': source must be"),
    ({'tokenizer': {'tokens': ['x']}}, 'tokens must be'),
    ({'chat_template': 'chatlm'}, "Did you mean 'chatml'"),
    ({'chat_template': 7}, 'must be a name or the text'),
  )  # fmt: skip
  def test_slips_are_refused(self, changes, message):
    with self.assertRaisesRegex(mj.UserError, message):
      recipe_lib.parse_recipe(
        {'merge_method': 'linear', 'models': ['a'], **changes}
      )

  def test_a_folder_with_an_at_sign_keeps_its_name(self):
    folder = pathlib.Path(self.create_tempdir().full_path) / 'a@b'
    folder.mkdir()
    recipe = recipe_lib.parse_recipe(
      {'merge_method': 'linear', 'models': [str(folder), f'x@1+{folder}']}
    )
    names = [source.model for source in recipe.slices[0].inputs]
    self.assertEqual(names, [str(folder), f'x+{folder}'])

  def test_slices_take_numbers_as_mergekit_does(self):
    source = {'model': 'a', 'layer_range': ['0', 2.0]}
    recipe = recipe_lib.parse_recipe(
      {'merge_method': 'passthrough', 'slices': [{'sources': [source]}]}
    )
    self.assertEqual(recipe.slices[0].inputs[0].layers, (0, 2))


class TokensTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    self.models = {}
    # b has the tokens of a in another order, and one more.
    orders = {'a': list('pqrs'), 'b': list('sqprz')}
    for name, order in orders.items():
      self.models[name] = models_on_disk.llama(rng, vocab=len(order), layers=1)
      tokens = {token: row for row, token in enumerate(order)}
      models_on_disk.save(self.folder / name, self.models[name], tokens)

  def merged(self, tokenizer, **more):
    plan = mj.plan({
      'merge_method': 'linear',
      'models': [str(self.folder / n) for n in 'ab'],
      'tokenizer': tokenizer, **more,
    })  # fmt: skip
    mj.execute(plan, self.folder / 'out')
    return plan, tree_lib.flatten(
      mj.open_checkpoint(self.folder / 'out').read()
    )

  def test_rows_come_from_where_the_recipe_says(self):
    a, b = str(self.folder / 'a'), str(self.folder / 'b')
    tokens = {
      '<new>': {'source': {'kind': 'model_token', 'model': b, 'token': 'z'}},
      '<row>': {'source': {'kind': 'model_token', 'model': a, 'token_id': 2}},
      '<zero>': {'source': {'kind': 'zero'}},
      'q': {'source': b, 'force': True},
      'z': {'source': {'kind': 'zero'}},
      'p': b,  # both have it: nothing to take
    }
    _, found = self.merged(
      {'source': 'union', 'tokens': tokens, 'pad_to_multiple_of': 6}
    )
    for path in ('model.embed_tokens.weight', 'lm_head.weight'):
      x, y = self.models['a'][path], self.models['b'][path]
      zero = np.zeros_like(x[0])
      ours = np.stack([x[0], y[1], x[2], x[3], zero, y[4], x[2], zero])
      theirs = np.stack([y[2], y[1], y[3], y[0], y[4], y[4], x[2], zero])
      rows = [
        np.concatenate([own, np.tile(own.mean(0), (4, 1))])
        for own in (ours, theirs)
      ]
      np.testing.assert_allclose(found[path], np.mean(rows, 0), atol=1e-6)
    saved = json.loads((self.folder / 'out' / 'tokenizer.json').read_text())
    added = {one['content']: one['id'] for one in saved['added_tokens']}
    self.assertEqual(added, {'z': 4, '<new>': 5, '<row>': 6, '<zero>': 7})
    config = json.loads((self.folder / 'out' / 'config.json').read_text())
    self.assertEqual(config['vocab_size'], 12)

  def test_wrong_rows_are_told(self):
    b = str(self.folder / 'b')
    for source, message in (
      ({'kind': 'model_token', 'model': b, 'token': 'none'}, 'has no token'),
      ({'kind': 'model_token', 'model': b, 'token_id': 5}, 'row 5 of .*has 5'),
      ('elsewhere', 'none of the models'),
    ):
      with self.assertRaisesRegex(mj.UserError, message):
        self.merged({'tokens': {'x': {'source': source}}})

  def test_a_model_without_tokenizer_has_that_of_the_first(self):
    models_on_disk.save(self.folder / 'b', self.models['a'])
    (self.folder / 'b' / 'tokenizer.json').unlink()
    plan, found = self.merged({})
    self.assertRegex('\n'.join(plan.remarks), 'b has no tokenizer.json')
    np.testing.assert_allclose(
      found['lm_head.weight'], self.models['a']['lm_head.weight'], atol=1e-6
    )
    models_on_disk.save(self.folder / 'b', self.models['b'])
    (self.folder / 'b' / 'tokenizer.json').unlink()
    with self.assertRaisesRegex(mj.UserError, 'b has no tokenizer.json'):
      self.merged({})


class TemplatesTest(parameterized.TestCase):
  CHAT = (
    {'role': 'system', 'content': 'Be kind.'},
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Yes?'},
    {'role': 'user', 'content': 'Bye'},
  )

  @parameterized.parameters(
    ('chatml', '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi'
     '<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye'
     '<|im_end|>\n<|im_start|>assistant\n'),
    ('alpaca', 'Be kind.\n\n### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n'
     '### Instruction:\nBye\n\n### Response:\n'),
    ('llama3', '<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.'
     '<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>'
     '<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>'
     '<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>'
     '<|start_header_id|>assistant<|end_header_id|>\n\n'),
    ('mistral', '<s>[INST] Be kind.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]'),
    ('exaone', '[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?'
     '[|endofturn|]\n[|user|]Bye\n[|assistant|]'),
  )  # fmt: skip
  @unittest.skipUnless(importlib.util.find_spec('jinja2'), 'needs jinja2')
  def test_by_name(self, name, expected):
    import jinja2  # pylint: disable=import-outside-toplevel

    # As transformers sets it up.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    found = environment.from_string(chat_templates.NAMED[name]).render(
      messages=self.CHAT, bos_token='<s>', eos_token='</s>',
      add_generation_prompt=True,
    )  # fmt: skip
    self.assertEqual(found, expected)

  def test_auto_is_the_most_common(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    names = 'abcd'
    for name in names:
      models_on_disk.save(folder / name, models_on_disk.llama(rng, layers=1))
    settings = lambda value: json.dumps({'chat_template': value})
    (folder / 'a' / 'tokenizer_config.json').write_text(settings('{{ 1 }}'))
    # A file of its own comes before the settings.
    (folder / 'b' / 'tokenizer_config.json').write_text(settings('{{ 1 }}'))
    (folder / 'b' / 'chat_template.jinja').write_text('{{ 2 }}\n')
    (folder / 'c' / 'tokenizer_config.json').write_text(
      settings([{'name': 'default', 'template': '{{ 2 }}'}])
    )
    recipe = {
      'merge_method': 'linear',
      'models': [str(folder / name) for name in names],
      'chat_template': 'auto',
    }
    plan = mj.plan(recipe)
    self.assertEqual(plan.recipe.chat_template, '{{ 2 }}')
    self.assertIn('that of 2 of 4 models', '\n'.join(plan.remarks))
    plan = mj.plan({**recipe, 'models': recipe['models'][3:]})
    self.assertIsNone(plan.recipe.chat_template)


if __name__ == '__main__':
  absltest.main()
