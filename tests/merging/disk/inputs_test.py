# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models that store more than others: buffers, tied heads, leaves of one."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import models_on_disk
import numpy as np

import mergejax as mj
from mergejax.checkpoints import ties
from mergejax.core import tree as tree_lib

EMBED = 'model.embed_tokens.weight'


class InputsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.rng = np.random.default_rng(0)

  def leaf(self, *shape):
    return self.rng.normal(size=shape).astype(np.float32)

  def save(self, name, model, **config):
    path = self.folder / name
    mj.save_checkpoint(path, model, 'safetensors', config=config)
    return str(path)

  def merged(self, models, method='linear', **more):
    plan = mj.plan({'merge_method': method, 'models': models, **more})
    out = self.folder / f'out{len(list(self.folder.iterdir()))}'
    mj.execute(plan, out)
    config = json.loads((out / 'config.json').read_text())
    leaves = tree_lib.flatten(mj.open_checkpoint(out).read())
    return leaves, config, plan.describe()

  # Buffers -------------------------------------------------------------------

  @parameterized.parameters(
    ('model.layers.0.self_attn.rotary_emb.inv_freq', (4,), np.float32),
    ('model.rotary_emb.inv_freq', (4,), np.float32),
    ('embeddings.position_ids', (1, 8), np.int64),
    ('transformer.h.0.attn.bias', (1, 1, 8, 8), np.bool_),
    ('transformer.h.0.attn.masked_bias', (), np.float32),
    ('gpt_neox.layers.0.attention.bias', (1, 1, 8, 8), np.uint8),
    ('bn.num_batches_tracked', (), np.int64),
  )
  def test_a_buffer_of_one_model_is_left_out(self, path, shape, dtype):
    weights = [self.leaf(3, 2), self.leaf(3, 2)]
    a = self.save('a', {'w.weight': weights[0], path: np.ones(shape, dtype)})
    b = self.save('b', {'w.weight': weights[1]})
    for models in ([a, b], [b, a]):
      leaves, _, text = self.merged(models)
      self.assertEqual(list(leaves), ['w.weight'])
      np.testing.assert_allclose(leaves['w.weight'], sum(weights) / 2)
      self.assertIn('left out', text)
    # A rule keeps it, from whoever has it.
    leaves, _, _ = self.merged([b, a], rules=[{'match': '.*' + path[-6:], 'copy': a}])  # fmt: skip
    np.testing.assert_array_equal(leaves[path], np.ones(shape, dtype))

  def test_buffers_of_all_models_are_copied_and_not_merged(self):
    path = 'model.layers.0.self_attn.rotary_emb.inv_freq'
    paths = [
      self.save(n, {'w.weight': self.leaf(3, 2), path: np.full(4, v, np.float32)})
      for n, v in (('a', 1.0), ('b', 3.0))
    ]  # fmt: skip
    leaves, _, _ = self.merged(paths)
    np.testing.assert_array_equal(leaves[path], 1.0)

  def test_masks_of_two_lengths_are_left_out(self):
    path = 'transformer.h.0.attn.bias'
    paths = [
      self.save(n, {'w.weight': self.leaf(3, 2), path: np.ones((1, 1, k, k), bool)})
      for n, k in (('a', 4), ('b', 8))
    ]  # fmt: skip
    leaves, _, _ = self.merged(paths)
    self.assertEqual(list(leaves), ['w.weight'])

  def test_a_bias_is_no_mask(self):
    path = 'transformer.h.0.attn.bias'
    a = self.save('a', {'w.weight': self.leaf(3, 2), path: self.leaf(3)})
    b = self.save('b', {'w.weight': self.leaf(3, 2)})
    with self.assertRaisesRegex(mj.UserError, r'(?s)attn\.bias.*copy: MODEL'):
      mj.plan({'merge_method': 'linear', 'models': [a, b]})

  # Leaves of one model ---------------------------------------------------------

  @parameterized.parameters('linear', 'task_arithmetic')
  def test_a_rule_copies_what_only_one_model_has(self, method):
    w = {n: self.leaf(3, 2) for n in 'abc'}
    extra = self.leaf(2)
    a, b, c = (
      self.save(n, {'w.weight': w[n], **({'extra': extra} if n == 'b' else {})})
      for n in 'abc'
    )
    base = {'base_model': c} if method == 'task_arithmetic' else {}
    rules = [{'match': 'extra', 'copy': b}]
    for models in ([a, b], [b, a]):
      leaves, _, _ = self.merged(models, method, rules=rules, **base)
      np.testing.assert_array_equal(leaves['extra'], extra)
      total = w['a'] + w['b']
      expected = total - w['c'] if base else total / 2
      np.testing.assert_allclose(leaves['w.weight'], expected, atol=1e-6)
    with self.assertRaisesRegex(mj.UserError, 'extra cannot be copied .*lacks'):
      mj.plan({
        'merge_method': 'linear', 'models': [b, a],
        'rules': [{'match': 'extra', 'copy': a}],
      })  # fmt: skip

  def test_a_copy_must_fit(self):
    a = self.save('a', {'w.weight': self.leaf(3, 2), 'x': self.leaf(2)})
    b = self.save('b', {'w.weight': self.leaf(3, 2), 'x': self.leaf(3)})
    rules = [{'match': 'x', 'copy': b}]
    with self.assertRaisesRegex(
      mj.UserError, r'x cannot be copied.*\[3\] there'
    ):
      mj.plan({'merge_method': 'linear', 'models': [a, b], 'rules': rules})

  # Tied heads ------------------------------------------------------------------

  @parameterized.parameters(
    ('lm_head.weight', EMBED, {'tie_word_embeddings': True}),
    ('lm_head.weight', 'model.language_model.embed_tokens.weight',
     {'text_config': {'tie_word_embeddings': True}}),
    ('language_model.lm_head.weight',
     'language_model.model.embed_tokens.weight',
     {'tie_word_embeddings': True,
      'text_config': {'tie_word_embeddings': True}}),
    ('lm_head.weight', 'language_model.model.embed_tokens.weight',
     {'tie_word_embeddings': True}),
    ('proj_out.weight', 'model.decoder.embed_tokens.weight',
     {'architectures': ['WhisperForConditionalGeneration']}),
    ('lm_head.weight', 'shared.weight',
     {'architectures': ['T5ForConditionalGeneration']}),
    ('lm_head.weight', 'transformer.wte.weight',
     {'architectures': ['GPT2LMHeadModel']}),
    ('embed_out.weight', 'gpt_neox.embed_in.weight',
     {'tie_word_embeddings': True}),
    ('cls.predictions.decoder.weight',
     'bert.embeddings.word_embeddings.weight',
     {'architectures': ['BertForMaskedLM']}),
    ('encoder.embed_tokens.weight', 'shared.weight', {}),
    ('encoder.embed_tokens.weight', 'shared.weight',
     {'tie_word_embeddings': False}),
    ('model.decoder.embed_tokens.weight', 'model.shared.weight', {}),
  )  # fmt: skip
  def test_a_head_that_one_model_stores(self, head, path, config):
    more = {'cls.predictions.transform.dense.weight': self.leaf(2, 2)}
    more = more if head.startswith('cls') else {}
    tables = [self.leaf(5, 2), self.leaf(5, 2)]
    a = self.save('a', {path: tables[0], head: tables[0], **more}, **config)
    b = self.save('b', {path: tables[1], **more}, **config)
    for models in ([a, b], [b, a]):
      leaves, _, text = self.merged(models)
      self.assertCountEqual(leaves, [path, *more])
      np.testing.assert_allclose(leaves[path], sum(tables) / 2, atol=1e-6)
      self.assertIn(f'{head} stays tied to {path}', text)
    # Not if what is stored is another array.
    c = self.save('c', {path: tables[0], head: tables[1], **more}, **config)
    plan = mj.plan({'merge_method': 'linear', 'models': [b, c]})
    with self.assertRaisesRegex(mj.UserError, f'{head} should repeat {path}'):
      mj.execute(plan, self.folder / 'differs')

  @parameterized.parameters(ml_dtypes.bfloat16, np.float16)
  def test_a_head_of_another_dtype_is_not_its_embedding(self, dtype):
    table = np.zeros((5, 2), np.float32)
    config = {'tie_word_embeddings': True}
    a = self.save('a', {EMBED: table, 'lm_head.weight': table.astype(dtype)}, **config)  # fmt: skip
    plan = mj.plan({'merge_method': 'linear', 'models': [a]})
    with self.assertRaisesRegex(mj.UserError, 'should repeat'):
      mj.execute(plan, self.folder / 'out')

  def test_untied_in_sections(self):
    path = 'model.language_model.embed_tokens.weight'
    tables = [self.leaf(5, 2), self.leaf(5, 2)]
    head = self.leaf(5, 2)
    tied = {'text_config': {'tie_word_embeddings': True}, 'tie_word_embeddings': True}  # fmt: skip
    loose = {'text_config': {'tie_word_embeddings': False}}
    a = self.save('a', {path: tables[0]}, **tied)
    b = self.save('b', {path: tables[1], 'lm_head.weight': head}, **loose)
    with self.assertRaisesRegex(mj.UserError, 'untie: true'):
      mj.plan({'merge_method': 'linear', 'models': [a, b]})
    leaves, config, _ = self.merged([a, b], untie=True)
    np.testing.assert_allclose(leaves['lm_head.weight'], (tables[0] + head) / 2, atol=1e-6)  # fmt: skip
    self.assertEqual(config, {
      'text_config': {'tie_word_embeddings': False},
      'tie_word_embeddings': False,
    })  # fmt: skip
    store = mj.open_checkpoint(self.folder / 'out2')
    self.assertEqual(store.tied, {})

  def test_untying_gives_one_head_of_the_right_name(self):
    path = 'model.decoder.embed_tokens.weight'
    config = {'architectures': ['WhisperForConditionalGeneration']}
    table = self.leaf(5, 2)
    conv = {'model.encoder.conv1.weight': self.leaf(2, 2, 3)}
    a = self.save('a', {path: table, **conv}, **config)
    leaves, _, _ = self.merged([a], untie=True)
    self.assertCountEqual(leaves, [path, 'proj_out.weight', *conv])
    np.testing.assert_array_equal(leaves['proj_out.weight'], table)

  def test_heads_of_t5_are_not_mixed_up(self):
    # Stores the copies of the embedding that old versions wrote, not the head.
    table = self.leaf(5, 2)
    config = {'architectures': ['T5ForConditionalGeneration']}
    copies = {
      f'{side}.embed_tokens.weight': table for side in ('encoder', 'decoder')
    }
    a = self.save('a', {'shared.weight': table, **copies}, **config)
    b = self.save('b', {'shared.weight': table}, **config)
    leaves, _, text = self.merged([a, b], untie=True)
    self.assertCountEqual(leaves, ['shared.weight', 'lm_head.weight'])
    self.assertIn('lm_head.weight is untied', text)
    self.assertEqual(ties.tied({'shared.weight': None}, config), {'lm_head.weight': 'shared.weight'})  # fmt: skip

  # Vocabularies ----------------------------------------------------------------

  def test_rows_of_positions_are_no_tokens(self):
    positions = 'model.decoder.embed_positions.weight'
    table = 'model.decoder.embed_tokens.weight'
    order = [2, 0, 1]
    model = {positions: self.leaf(3, 2), table: self.leaf(3, 2)}
    paths = []
    for name, rows in (('a', [0, 1, 2]), ('b', order)):
      path = self.save(name, model)
      vocabulary = {f't{t}': row for row, t in enumerate(rows)}
      (self.folder / name / 'tokenizer.json').write_text(
        json.dumps({'model': {'type': 'BPE', 'vocab': vocabulary}})
      )
      paths.append(path)
    leaves, _, _ = self.merged(paths, tokenizer_source='base', base_model=paths[0])  # fmt: skip
    np.testing.assert_array_equal(leaves[positions], model[positions])
    own = model[table]
    expected = (own + own[np.argsort(order)]) / 2
    np.testing.assert_allclose(leaves[table], expected, atol=1e-6)

  def test_a_repeated_head_under_an_adapter(self):
    model = models_on_disk.llama(self.rng, layers=1, tied=True)
    model['lm_head.weight'] = model[EMBED]
    models_on_disk.save(self.folder / 'base', model, tie_word_embeddings=True)
    adapter = self.folder / 'lora'
    adapter.mkdir()
    (adapter / 'adapter_config.json').write_text(
      '{"peft_type": "LORA", "r": 1, "lora_alpha": 2}'
    )
    name = 'model.layers.0.self_attn.q_proj'
    up, down = self.leaf(12, 1), self.leaf(1, 12)
    mj.save_checkpoint(
      adapter / 'adapter_model.safetensors',
      {
        f'base_model.model.{name}.lora_A.weight': down,
        f'base_model.model.{name}.lora_B.weight': up,
      },
    )
    leaves, _, _ = self.merged([f'{self.folder / "base"}+{adapter}'])
    np.testing.assert_allclose(
      leaves[f'{name}.weight'], model[f'{name}.weight'] + 2 * up @ down, atol=1e-5
    )  # fmt: skip
    self.assertNotIn('lm_head.weight', leaves)


if __name__ == '__main__':
  absltest.main()
