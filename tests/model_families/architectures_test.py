# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Equal shapes are not equal functions: what is refused, told, left alone."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import models_on_disk
import numpy as np
import optax

import mergejax as mj
from mergejax import models
from mergejax.cli import main
from mergejax.cli import train
from mergejax.models import architectures
from mergejax.nn import lm

LLAMA = {
  'model_type': 'llama',
  'hidden_act': 'silu',
  'hidden_size': 12,
  'num_attention_heads': 2,
  'num_key_value_heads': 2,
}
T5 = {'model_type': 't5', 'num_heads': 2}
LM = {'model_type': 'lm', 'emb_dim': 8, 'num_heads': 2, 'head_dim': 4}
VL = {
  'model_type': 'llava',
  'text_config': LLAMA,
  'vision_config': {'depth': 2},
}


def nested(**fields):
  return {**VL, 'text_config': {**LLAMA, **fields}}


class DifferencesTest(parameterized.TestCase):
  @parameterized.parameters(
    (LLAMA, {**LLAMA, 'hidden_act': 'gelu'}, 'hidden_act'),
    (LLAMA, {**LLAMA, 'num_attention_heads': 4}, 'num_attention_heads'),
    # 12 wide with 2 heads are heads of 6, whether it is written or not.
    (LLAMA, {**LLAMA, 'head_dim': 3}, 'head_dim'),
    ({**LLAMA, 'head_dim': 3}, LLAMA, 'head_dim'),
    (T5, {**T5, 'relative_attention_max_distance': 64},
     'relative_attention_max_distance'),
    (T5, {**T5, 'feed_forward_proj': 'gated-silu'}, 'feed_forward_proj'),
    # No table knows this field; it counts all the same.
    ({**T5, 'norm_kind': 'rms'}, {**T5, 'norm_kind': 'layer'}, 'norm_kind'),
    (LLAMA, {**LLAMA, 'model_type': 'gemma'}, 'model_type'),
    (VL, nested(hidden_act='gelu'), 'text_config.hidden_act'),
    (LM, {**LM, 'mlp_activations': ['silu', 'linear']}, 'mlp_activations'),
    (LM, {**LM, 'num_heads': 4, 'head_dim': 2}, 'num_heads'),
    # The default of this project's models is known.
    (LM, {**LM, 'relative_max_distance': 64}, 'relative_max_distance'),
  )  # fmt: skip
  def test_what_changes_the_function(self, a, b, field):
    found = architectures.differences(a, b)
    self.assertEqual(found[0].field, field)
    self.assertTrue(found[0].changes_function)

  @parameterized.parameters(
    {'rope_theta': (1e4, 1e6)},
    {'rope_scaling': ({'factor': 2.0}, {'factor': 4.0})},
    {'max_position_embeddings': (2048, 8192)},
    {'sliding_window': (4096, 1024)},
    {'eos_token_id': (2, [2, 3])},
    {'rms_norm_eps': (1e-5, 1e-6)},
    {'layer_norm_epsilon': (1e-5, 1e-6)},
    {'architectures': (['LlamaModel'], ['LlamaForCausalLM'])},
    {'id2label': ({'0': 'a'}, {'0': 'b'})},
    {'layer_types': (['full'], ['sliding'])},
    {'mm_vision_tower': ('hub/name', '/folder')},
  )
  def test_what_is_told(self, **field):
    ((name, values),) = field.items()
    found = architectures.differences(*({**LLAMA, name: v} for v in values))
    self.assertEqual(found, [architectures.Difference(name, *values, False)])
    # An unknown meaning of absence is told, not refused.
    found = architectures.differences(LLAMA, {**LLAMA, name: values[0]})
    self.assertEqual([(d.field, d.changes_function) for d in found], [(name, False)])  # fmt: skip

  @parameterized.parameters(
    {'torch_dtype': ('float32', 'bfloat16')},
    {'_name_or_path': ('a', 'b')},
    {'transformers_version': ('4.40', '5.0')},
    {'use_cache': (True, False)},
    {'attention_dropout': (0.0, 0.1)},
    {'classifier_dropout': (None, 0.1)},
    {'initializer_range': (0.02, 0.01)},
    {'init_config': ({'std': 1.0}, {'std': 2.0})},
    {'attn_config': ({'attn_impl': 'a'}, {'attn_impl': 'b'})},
    {'tokenizer_padding_side': ('left', 'right')},
    {'vocab_size': (100, 101)},
    {'tie_word_embeddings': (True, False)},
  )
  def test_what_is_left_alone(self, **field):
    ((name, values),) = field.items()
    configs = [{**LLAMA, name: v} for v in values]
    self.assertEqual(architectures.differences(*configs), [])
    self.assertEqual(architectures.differences(LLAMA, configs[1]), [])

  def test_absent_and_default_are_the_same(self):
    for a, more in (
      (LLAMA, {'head_dim': 6, 'pruned_heads': {}, 'mlp_bias': False}),
      (LLAMA, {'head_dim': None, 'num_key_value_heads': 2}),
      ({**LLAMA, 'head_dim': None, 'hidden_act': None},
       {'head_dim': 6, 'hidden_act': 'silu'}),
      ({**LLAMA, 'model_type': 'granite', 'head_dim': None}, {'head_dim': 6}),
      ({k: v for k, v in LLAMA.items() if k != 'num_key_value_heads'},
       {'num_key_value_heads': 2}),
      (T5, {'relative_attention_max_distance': 128}),
      (LM, {'mlp_activations': ['gelu', 'linear'], 'dropout_rate': 0.1}),
    ):  # fmt: skip
      self.assertEqual(architectures.differences(a, {**a, **more}), [])
      self.assertEqual(architectures.differences({**a, **more}, a), [])


class MergeTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    self.models = {n: models_on_disk.llama(rng, layers=1) for n in 'ab'}

  def save(self, a, b):
    for name, config in (('a', a), ('b', b)):
      models_on_disk.save(self.folder / name, self.models[name], **config)
    return [str(self.folder / name) for name in 'ab']

  def test_plans_refuse_and_tell(self):
    paths = self.save(LLAMA, {**LLAMA, 'hidden_act': 'gelu', 'rope_theta': 5.0})
    recipe = {'merge_method': 'linear', 'models': paths}
    with self.assertRaisesRegex(
      mj.UserError, "hidden_act: 'silu' in .*a, 'gelu' in .*b"
    ):
      mj.plan(recipe)
    plan = mj.plan({**recipe, 'ignore_config': ['hidden_act']})
    for words in ('rope_theta: not given in', "hidden_act: 'silu' in"):
      self.assertIn(words, plan.describe())

  def test_a_model_without_config_is_told(self):
    paths = self.save(LLAMA, LLAMA)
    (self.folder / 'b' / 'config.json').unlink()
    plan = mj.plan({'merge_method': 'linear', 'models': paths})
    self.assertIn('b has no config.json', plan.describe())

  def test_an_adapter_has_the_configuration_of_its_base(self):
    paths = self.save(LLAMA, {**LLAMA, 'num_attention_heads': 3})
    adapter = self.folder / 'lora'
    adapter.mkdir()
    (adapter / 'adapter_config.json').write_text(
      '{"peft_type": "LORA", "r": 1, "lora_alpha": 1}'
    )
    prefix = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
    leaves = {
      f'{prefix}A.weight': np.ones((1, 12), np.float32),
      f'{prefix}B.weight': np.ones((12, 1), np.float32),
    }
    mj.save_checkpoint(adapter / 'adapter_model.safetensors', leaves)
    models = [paths[0], f'{paths[1]}+{adapter}']
    with self.assertRaisesRegex(mj.UserError, 'num_attention_heads: 2.*3'):
      mj.plan({'merge_method': 'linear', 'models': models})
    mj.plan({'merge_method': 'linear', 'models': [paths[0], f'{paths[0]}+{adapter}']})  # fmt: skip

  def test_in_memory(self):
    paths = self.save(LLAMA, {**LLAMA, 'num_attention_heads': 4})
    stores = [mj.open_checkpoint(path) for path in paths]
    for given in (paths, stores, [paths[0], stores[1]]):
      with self.assertRaisesRegex(mj.UserError, 'num_attention_heads: 2'):
        mj.merge(given, 'linear')
    with self.assertRaisesRegex(mj.UserError, 'num_attention_heads'):
      mj.merge(paths[:1], 'task_arithmetic', base=paths[1])
    merged = mj.merge([store.read() for store in stores], 'linear')
    np.testing.assert_allclose(
      merged['model.norm.weight'],
      (self.models['a']['model.norm.weight'] + self.models['b']['model.norm.weight']) / 2,
      rtol=1e-6,
    )  # fmt: skip
    paths = self.save(
      {**LLAMA, 'rope_theta': 1.0}, {**LLAMA, 'rope_theta': 2.0}
    )
    with self.assertLogs(level='WARNING') as logs:
      mj.merge(paths, 'linear')
    self.assertIn('rope_theta: 1.0 in', logs.output[0])


class OwnModelsTest(parameterized.TestCase):
  """Checkpoints of this project: fine-tuned, aligned, merged."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.module = lm.LanguageModel(
      lm.LMConfig(
        vocab_size=16, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=4,
        num_layers=1, dropout_rate=0.1,
      )
    )  # fmt: skip

  def save(self, name, **changes):
    config = {**models.describe(self.module), 'dropout_rate': 0.0, **changes}
    params = jax.tree.map(
      lambda s: np.zeros(s.shape, s.dtype),
      jax.eval_shape(
        lambda: models.family_of(models.build(config)).init(jax.random.key(0))
      ),
    )
    mj.save_checkpoint(self.folder / name, params, config=config)
    return self.folder / name

  @parameterized.parameters(
    ({'num_heads': 4, 'head_dim': 2}, 'num_heads: 2 in the configured module'),
    ({'mlp_activations': ['silu', 'linear']}, 'mlp_activations'),
    ({'relative_max_distance': 64}, 'relative_max_distance: 128'),
    ({'vocab_size': 20}, r'token_embedder/embedding \[16, 8\] expected'),
  )
  def test_fine_tuning_starts_from_the_same_function(self, changes, words):
    with mock.patch.object(train.stream_lib, 'SeqioStream') as stream:
      with self.assertRaisesRegex(mj.UserError, words):
        self.fine_tune(self.save('seed', **changes))
    stream.assert_not_called()

  def test_fine_tuning_may_drop_out_and_compute_otherwise(self):
    seed = self.save('seed', dtype='bfloat16')
    with (
      mock.patch.object(train.stream_lib, 'find'),
      mock.patch.object(train, 'open_shared', return_value=(None, {}, True)),
      mock.patch.object(
        train.trainer_lib.Trainer, 'fit', side_effect=InterruptedError
      ),
      self.assertRaises(InterruptedError),
    ):
      self.fine_tune(seed)

  def fine_tune(self, seed):
    train.train_model(
      module=self.module, optimizer=optax.sgd(0.1), mixture_or_task='none',
      model_dir=self.folder / 'run', steps=1, batch_size=8, lengths={},
      initial_checkpoint=seed, kind='lm', seed=0, save_every=1,
    )  # fmt: skip

  def test_commands_over_several_models(self):
    a = self.save('a')
    b = self.save('b', mlp_activations=['silu', 'linear'])
    with self.assertRaisesRegex(mj.UserError, 'mlp_activations'):
      mj.plan({'merge_method': 'linear', 'models': [str(a), str(b)]})
    out = str(self.folder / 'out')
    for command in (
      ['align', str(a), str(b), out],
      ['extract-lora', str(a), str(b), out, '--rank', '1'],
      ['stats', 'survey', str(a), str(b)],
    ):
      with mock.patch('sys.stderr') as err:
        code = main.main(command)
      self.assertEqual(code, 2)
      self.assertIn('mlp_activations', str(err.mock_calls))


if __name__ == '__main__':
  absltest.main()
