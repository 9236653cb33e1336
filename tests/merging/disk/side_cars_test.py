# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands beside merged weights is true of them, safe, and all there is."""

import importlib.util
import json
import pathlib
import pickle
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import models_on_disk
import numpy as np

import mergejax as mj
from mergejax.checkpoints import vocabulary
from mergejax.merging.disk import companions
from mergejax.merging.disk import configs
from mergejax.merging.disk import executor

FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


def added(row, content, *flags):
  said = {flag: flag in flags for flag in FLAGS}
  return {'id': row, 'content': content, **said}


def read(path):
  return json.loads(path.read_text())


class ConfigsTest(parameterized.TestCase):
  def test_dtype_wherever_one_is_named(self):
    config = {
      'dtype': 'float32', 'hidden_size': 4,
      'text_config': {'torch_dtype': 'torch.float32', 'dtype': None},
      'audio_config': {'encoder': {'dtype': 'float16'}},
    }  # fmt: skip
    self.assertEqual(configs.changed(config, {}, 'bfloat16'), {
      'dtype': 'bfloat16', 'hidden_size': 4,
      'text_config': {'torch_dtype': 'bfloat16', 'dtype': None},
      'audio_config': {'encoder': {'dtype': 'bfloat16'}},
    })  # fmt: skip
    self.assertEqual(configs.changed(config, {}, None), config)

  @parameterized.parameters(
    ({'vocab_size': 8}, {'vocab_size': 9}),
    ({}, {}),
    ({'text_config': {'vocab_size': 8}, 'vision_config': {'vocab_size': 5}},
     {'text_config': {'vocab_size': 9}, 'vision_config': {'vocab_size': 5}}),
    ({'vision_config': {'vocab_size': 5}, 'llm_config': {'vocab_size': 8}},
     {'vision_config': {'vocab_size': 5}, 'llm_config': {'vocab_size': 9}}),
    ({'vocab_size': 8, 'text_config': {'vocab_size': 8},
      'codes': {'vocab_size': 5}},
     {'vocab_size': 9, 'text_config': {'vocab_size': 9},
      'codes': {'vocab_size': 5}}),
    ({'thinker': {'text_config': {'vocab_size': 8}, 'codes': {'vocab_size': 8}},
      'talker': {'vocab_size': 7}},
     {'thinker': {'text_config': {'vocab_size': 9}, 'codes': {'vocab_size': 9}},
      'talker': {'vocab_size': 7}}),
    ({'vocab_size': 8, 'decoder_vocab_size': 8},
     {'vocab_size': 9, 'decoder_vocab_size': 9}),
    ({'encoder': {'vocab_size': 8}, 'decoder': {'vocab_size': 8}},
     {'encoder': {'vocab_size': 9}, 'decoder': {'vocab_size': 9}}),
  )  # fmt: skip
  def test_rows_where_they_are_counted(self, config, expected):
    found = configs.changed(config, {'vocab_size': 9}, None)
    self.assertEqual(found, expected)

  def test_plain_weights_are_not_called_quantised(self):
    config = {
      'quantization_config': {'quant_method': 'fp8'},
      'text_config': {'compression_config': {}, 'a': 1},
    }
    found = configs.changed(config, {}, None)
    self.assertEqual(found, {'text_config': {'a': 1}})
    self.assertIn('quantization_config', config)  # a copy was changed


class MergedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
      models_on_disk.save(
        self.folder / name, models_on_disk.llama(rng, vocab=8, layers=1)
      )
    self.a, self.b = self.folder / 'a', self.folder / 'b'
    self.out = self.folder / 'out'

  def tokenizer(self, folder, entries):
    tokens = {'version': '1.0', 'added_tokens': entries, 'model': {
      'type': 'WordLevel', 'vocab': {'x': 0, 'y': 1}, 'unk_token': 'x',
    }}  # fmt: skip
    (folder / 'tokenizer.json').write_text(json.dumps(tokens))

  def merge(self, *names, **recipe):
    models = [{'model': str(self.folder / name)} for name in names or 'ab']
    plan = mj.plan({'merge_method': 'linear', 'models': models, **recipe})
    executor.execute(plan, self.out)
    return plan.describe()

  @parameterized.parameters('torch_dtype', 'dtype')
  def test_config_names_the_dtype_of_the_weights(self, key):
    config = read(self.a / 'config.json')
    del config['torch_dtype']
    config.update({key: 'float16', 'text_config': {key: 'float16'}})
    (self.a / 'config.json').write_text(json.dumps(config))
    self.merge()  # float32, whatever the configuration said
    merged = read(self.out / 'config.json')
    self.assertEqual(merged[key], 'float32')
    self.out.rename(self.folder / 'first')
    self.merge(dtype='bfloat16')
    merged = read(self.out / 'config.json')
    self.assertEqual(
      (merged[key], merged['text_config'][key]), ('bfloat16',) * 2
    )
    self.assertEqual({k for k in merged if 'dtype' in k}, {key})

  def test_new_tokens_keep_their_flags(self):
    rows = {'x': 0, 'y': 1, '</s>': 2, '<|im_start|>': 3, 'word': 4, 'z': 5}
    self.tokenizer(self.a, [added(2, '</s>', 'special')])
    start = ('special', 'lstrip', 'rstrip')
    self.tokenizer(self.b, [
      added(2, '<|im_start|>', *start), added(3, '</s>'),
      added(4, 'word', 'single_word', 'normalized'), added(5, 'z'),
    ])  # fmt: skip
    decoder = {'2': {'content': '</s>', 'special': True}}
    (self.a / 'tokenizer_config.json').write_text(
      json.dumps({'added_tokens_decoder': decoder, 'eos_token': '</s>'})
    )
    (self.a / 'added_tokens.json').write_text('{"</s>": 2}')
    self.merge(tokenizer_source='union')
    expected = [
      added(2, '</s>', 'special'), added(3, '<|im_start|>', *start),
      added(4, 'word', 'single_word', 'normalized'), added(5, 'z'),
    ]  # fmt: skip
    self.assertEqual(
      read(self.out / 'tokenizer.json')['added_tokens'], expected
    )
    self.assertEqual(vocabulary.read_tokens(str(self.out)), rows)
    settings = read(self.out / 'tokenizer_config.json')
    self.assertEqual(settings['eos_token'], '</s>')
    self.assertEqual(settings['added_tokens_decoder'], decoder | {
      str(one['id']): {k: v for k, v in one.items() if k != 'id'}
      for one in expected[1:]
    })  # fmt: skip
    self.assertEqual(
      read(self.out / 'added_tokens.json'),
      {'</s>': 2, '<|im_start|>': 3, 'word': 4, 'z': 5},
    )

  def test_the_template_of_the_recipe_is_the_one_that_is_found(self):
    for name, text in {
      'chat_template.jinja': 'OLD', 'chat_template.json': '{"chat_template": 1}',
      'processor_config.json': '{"chat_template": "OLD", "a": 1}',
      'additional_chat_templates/tools.jinja': 'TOOLS',
    }.items():  # fmt: skip
      (self.a / name).parent.mkdir(exist_ok=True)
      (self.a / name).write_text(text)
    self.merge()
    self.assertEqual((self.out / 'chat_template.jinja').read_text(), 'OLD')
    self.assertTrue((self.out / 'chat_template.json').exists())
    self.out.rename(self.folder / 'first')
    self.merge(chat_template='NEW {{ messages }}')
    new = 'NEW {{ messages }}'
    self.assertEqual((self.out / 'chat_template.jinja').read_text(), new)
    self.assertFalse((self.out / 'chat_template.json').exists())
    for name in ('tokenizer_config.json', 'processor_config.json'):
      self.assertEqual(read(self.out / name)['chat_template'], new)
    tools = self.out / 'additional_chat_templates' / 'tools.jinja'
    self.assertEqual(tools.read_text(), 'TOOLS')

  @parameterized.parameters(
    ('b', 'tokenizer.json', [added(2, 'z'), added(3, '</s>')]),
    ('a', 'config.json', {'rope_theta': 5.0}),
    ('a', 'tokenizer_config.json', {'chat_template': 'NEW'}),
    ('a', 'generation_config.json', {'eos_token_id': 1}),
  )
  def test_what_stands_beside_the_weights_is_part_of_the_merge(
    self, name, file, change
  ):
    def stop(done, total):
      raise KeyboardInterrupt

    for folder in (self.a, self.b):
      self.tokenizer(folder, [added(2, '</s>'), added(3, 'z')])
    recipe = {'tokenizer_source': 'union', 'chat_template': 'auto'}
    models = [str(self.a), str(self.b)]
    plan = lambda: mj.plan(
      {'merge_method': 'linear', 'models': models} | recipe
    )
    executor.execute(plan(), self.out)
    self.assertEqual(executor.execute(plan(), self.out).computed, 0)
    begun = self.folder / 'begun'
    with self.assertRaises(KeyboardInterrupt):
      executor.execute(plan(), begun, progress=stop)
    if file == 'tokenizer.json':
      self.tokenizer(self.folder / name, change)
    else:
      path = self.folder / name / file
      there = read(path) if path.exists() else {}
      path.write_text(json.dumps(there | change))
    with self.assertRaisesRegex(mj.UserError, 'already exists and is not'):
      executor.execute(plan(), self.out)
    report = executor.execute(plan(), begun)
    self.assertLen(plan().tasks, report.computed)

  def test_settings_that_are_not_json_are_told_by_the_plan(self):
    (self.a / 'tokenizer_config.json').write_text('{')
    with self.assertRaisesRegex(mj.UserError, 'a/tokenizer_config.json is not'):
      self.merge(chat_template='{{ messages }}')
    self.assertFalse(self.out.exists())

  def test_what_is_safe_and_small_goes_along(self):
    copied = (
      'modules.json', '1_Pooling/config.json', '2_Dense/config.json',
      'sentence_bert_config.json', 'config_sentence_transformers.json',
      'preprocessor_config.json', 'processor_config.json',
      'video_preprocessor_config.json', 'sentencepiece.bpe.model',
      'spiece.model', 'source.spm', 'vocab.txt', 'merges.txt', 'vocab-src.json',
      'tekken.json', 'tokenizer.model.v3', 'LICENSE', 'generation_config.json',
    )  # fmt: skip
    left = {
      'code': ('modeling_foo.py', 'configuration_foo.py'),
      'pickles': ('pytorch_model.bin', 'training_args.bin', 'scheduler.pt',
                  'word2vec.model'),
      'weights of modules': ('2_Dense/model.safetensors',),
      'not known here': ('trainer_state.json', 'model.onnx', 'runs/'),
    }  # fmt: skip
    for name in (*copied, *(n for names in left.values() for n in names)):
      file = self.a / name if name[-1] != '/' else self.a / name / 'x.json'
      file.parent.mkdir(exist_ok=True)
      file.write_text('{}')
    (self.a / 'word2vec.model').write_bytes(pickle.dumps({'w': 1}))
    (self.a / '.git').mkdir()
    described = self.merge()
    for name in copied:
      self.assertEqual((self.out / name).read_text()[:1], '{', name)
    there = {str(f.relative_to(self.out)) for f in self.out.rglob('*')}
    for why, names in left.items():
      line = next(t for t in described.splitlines() if f'({why}' in t)
      for name in names:
        self.assertNotIn(name.rstrip('/'), there)
        self.assertIn(name, line)
    self.assertNotIn('.git', described)
    self.assertNotIn('model.safetensors.index', described)

  def test_what_is_large_stays_and_is_told(self):
    (self.a / 'vocab.txt').write_text('x' * 2000)
    with mock.patch.object(companions, '_LARGEST', 1999):
      described = self.merge()
    self.assertRegex(described, r'not copied \(more than .* MB\): vocab.txt')
    self.assertFalse((self.out / 'vocab.txt').exists())

  def test_the_tokenizer_of_one_and_the_processor_of_another(self):
    (self.a / 'vocab.txt').write_text('of a')
    (self.b / 'merges.txt').write_text('of b')
    for folder in (self.a, self.b):
      text = json.dumps({'size': folder.name})
      (folder / 'preprocessor_config.json').write_text(text)
    described = self.merge(tokenizer_source=str(self.b))
    self.assertFalse((self.out / 'vocab.txt').exists())
    self.assertEqual((self.out / 'merges.txt').read_text(), 'of b')
    processor = read(self.out / 'preprocessor_config.json')
    self.assertEqual(processor, {'size': 'a'})
    self.assertNotIn('vocab.txt', described)

  def test_special_tokens_are_found_by_another_tokenizer(self):
    rows = {'x': 0, 'y': 1, '</s>': 2, '<pad>': 3}
    self.tokenizer(self.a, [added(2, '</s>'), added(3, '<pad>')])
    self.tokenizer(self.b, [added(2, '<|im_end|>'), added(3, '</s>')])
    config = read(self.a / 'config.json') | {
      'eos_token_id': 2, 'bos_token_id': None, 'pad_token_id': 3,
      'num_attention_heads': 2, 'text_config': {'image_token_index': 1},
    }  # fmt: skip
    (self.a / 'config.json').write_text(json.dumps(config))
    (self.a / 'generation_config.json').write_text(
      '{"eos_token_id": [2, 0, 777], "top_k": 2}'
    )
    self.assertEqual(vocabulary.read_tokens(str(self.a)), rows)
    self.merge('a', tokenizer_source=str(self.b))
    merged = read(self.out / 'config.json')
    self.assertEqual(merged, config | {
      'eos_token_id': 3, 'pad_token_id': None, 'vocab_size': 4,
      'text_config': {'image_token_index': 1},
    })  # fmt: skip
    self.assertEqual(
      read(self.out / 'generation_config.json'),
      {'eos_token_id': [3, 0, 777], 'top_k': 2},
    )

  @unittest.skipUnless(
    importlib.util.find_spec('transformers'), 'transformers is not installed'
  )
  def test_transformers_loads_what_it_says(self):
    import transformers  # pylint: disable=import-outside-toplevel

    for name, tokens in (('a', ['</s>']), ('b', ['<|im_start|>', '</s>'])):
      config = transformers.LlamaConfig(
        vocab_size=2 + len(tokens), hidden_size=8, intermediate_size=8,
        num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
      )  # fmt: skip
      model = transformers.LlamaForCausalLM(config)
      model.save_pretrained(self.folder / name)
      entries = [added(2 + i, t, 'special') for i, t in enumerate(tokens)]
      self.tokenizer(self.folder / name, entries)
      (self.folder / name / 'tokenizer_config.json').write_text(
        json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'})
      )
      (self.folder / name / 'chat_template.jinja').write_text('OLD')
    self.merge(
      tokenizer_source='union', dtype='bfloat16', chat_template='{{ "NEW" }}'
    )
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
      self.out, output_loading_info=True
    )
    self.assertFalse(any(said.values()), said)
    self.assertEqual(str(model.dtype), 'torch.bfloat16')
    self.assertEqual(model.get_input_embeddings().weight.shape[0], 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(self.out)
    self.assertEqual(tokenizer.chat_template, '{{ "NEW" }}')
    self.assertEqual(
      tokenizer.get_vocab(), {'x': 0, 'y': 1, '</s>': 2, '<|im_start|>': 3}
    )
    self.assertTrue(tokenizer.added_tokens_decoder[3].special)


if __name__ == '__main__':
  absltest.main()
