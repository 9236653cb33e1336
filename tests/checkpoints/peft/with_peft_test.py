# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What PEFT itself writes and merges, where it is installed.

Each case makes a small model of transformers and an adapter of PEFT with random
numbers, saves both, and compares what is folded here with what PEFT merges
after loading the two.
"""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest

from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import extract
from mergejax.checkpoints.peft import fold
from mergejax.checkpoints.peft import kinds
from mergejax.checkpoints.peft import lora
from mergejax.core import tree as tree_lib

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings('ignore')

_SMALL = {
  'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
  'num_attention_heads': 2, 'vocab_size': 40, 'pad_token_id': 0,
}  # fmt: skip
_GROUPED = {**_SMALL, 'num_key_value_heads': 1}
_EXPERTS = {'num_local_experts': 3, 'num_experts_per_tok': 2}
# name: (architecture, config class, settings)
MODELS = {
  'llama': ('LlamaForCausalLM', 'LlamaConfig', _GROUPED),
  'classifier': (
    'LlamaForSequenceClassification', 'LlamaConfig', {**_GROUPED, 'num_labels': 3},
  ),
  'qwen2': ('Qwen2ForCausalLM', 'Qwen2Config', _GROUPED),
  'gpt2': (
    'GPT2LMHeadModel', 'GPT2Config',
    {'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'vocab_size': 40, 'n_positions': 16},
  ),
  'bert': (
    'BertForSequenceClassification', 'BertConfig',
    {**_SMALL, 'max_position_embeddings': 16, 'num_labels': 3},
  ),
  'resnet': (
    'ResNetForImageClassification', 'ResNetConfig',
    {
      'embedding_size': 8, 'hidden_sizes': [8, 16], 'depths': [1, 1],
      'layer_type': 'basic', 'num_labels': 3,
    },
  ),
  'gpt_oss': (
    'GptOssForCausalLM', 'GptOssConfig',
    {
      **_GROUPED, **_EXPERTS, 'intermediate_size': 16, 'head_dim': 8,
      'layer_types': ['full_attention'] * 2,
    },
  ),
  'mixtral': ('MixtralForCausalLM', 'MixtralConfig', {**_GROUPED, **_EXPERTS}),
}  # fmt: skip

Q = ['q_proj', 'down_proj']
_BOTH = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
_CONV = ['convolution']
# (case, model, configuration of PEFT, its settings)
CASES = (
  ('lora', 'llama', 'Lora', {'target_modules': Q}),
  ('rslora', 'llama', 'Lora', {'target_modules': Q, 'use_rslora': True}),
  ('patterns', 'llama', 'Lora', {
    'target_modules': Q, 'rank_pattern': {'layers.1.self_attn.q_proj': 2},
    'alpha_pattern': {'down_proj': 3},
  }),
  ('whole', 'llama', 'Lora', {
    'target_modules': Q, 'modules_to_save': ['lm_head', 'norm', 'embed_tokens'],
  }),
  ('table', 'llama', 'Lora', {'target_modules': ['embed_tokens', 'lm_head']}),
  ('tokens', 'llama', 'Lora', {
    'target_modules': Q, 'trainable_token_indices': [3, 1],
  }),
  ('bias', 'qwen2', 'Lora', {'target_modules': Q, 'bias': 'lora_only'}),
  ('lora_bias', 'qwen2', 'Lora', {
    'target_modules': ['q_proj'], 'lora_bias': True,
  }),
  ('dora', 'llama', 'Lora', {
    'target_modules': ['embed_tokens', *Q], 'use_dora': True,
  }),
  ('head', 'classifier', 'Lora', {'target_modules': Q, 'task_type': 'SEQ_CLS'}),
  ('bert', 'bert', 'Lora', {'target_modules': ['dense'], 'task_type': 'SEQ_CLS'}),
  ('conv', 'resnet', 'Lora', {'target_modules': _CONV, 'use_dora': True}),
  ('conv1d', 'gpt2', 'Lora', {'target_modules': ['c_attn', 'c_proj', 'c_fc']}),
  ('conv1d_dora', 'gpt2', 'Lora', {
    'target_modules': ['c_attn', 'c_proj'], 'use_dora': True,
  }),
  ('fused', 'gpt_oss', 'Lora', {
    'target_modules': ['q_proj'], 'target_parameters': _BOTH,
  }),
  ('split', 'mixtral', 'Lora', {
    'target_modules': ['q_proj'], 'target_parameters': _BOTH,
  }),
  ('pissa', 'llama', 'Lora', {
    'target_modules': Q, 'init_lora_weights': 'pissa',
  }),
  ('olora', 'llama', 'Lora', {
    'target_modules': Q, 'init_lora_weights': 'olora',
  }),
  ('adalora', 'gpt2', 'AdaLora', {
    'target_modules': ['c_attn'], 'init_r': 4, 'total_step': 9,
  }),
  ('ia3', 'qwen2', 'IA3', {
    'target_modules': Q, 'feedforward_modules': ['down_proj'],
  }),
  ('ia3_conv1d', 'gpt2', 'IA3', {
    'target_modules': ['c_attn', 'mlp.c_proj'], 'feedforward_modules': ['mlp.c_proj'],
  }),
  ('ia3_conv', 'resnet', 'IA3', {
    'target_modules': _CONV, 'feedforward_modules': _CONV,
  }),
  ('loha', 'llama', 'LoHa', {'target_modules': Q}),
  ('loha_conv', 'resnet', 'LoHa', {
    'target_modules': _CONV, 'use_effective_conv2d': True,
  }),
  ('lokr', 'llama', 'LoKr', {'target_modules': Q, 'r': 1, 'decompose_both': True}),
  ('lokr_conv', 'resnet', 'LoKr', {
    'target_modules': _CONV, 'r': 1, 'use_effective_conv2d': True,
  }),
  ('vera', 'gpt2', 'Vera', {'target_modules': ['c_attn', 'c_proj'], 'r': 4}),
  ('oft', 'llama', 'OFT', {'target_modules': Q, 'oft_block_size': 4, 'r': 0}),
  ('oft_table', 'llama', 'OFT', {
    'target_modules': ['embed_tokens'], 'oft_block_size': 4, 'r': 0,
  }),
  ('boft', 'llama', 'BOFT', {
    'target_modules': ['q_proj'], 'boft_block_size': 4,
    'boft_n_butterfly_factor': 2,
  }),
  ('hra', 'llama', 'HRA', {'target_modules': Q, 'apply_GS': True}),
  ('c3a', 'llama', 'C3A', {'target_modules': Q, 'block_size': 4}),
  ('shira', 'llama', 'Shira', {'target_modules': Q, 'r': 2}),
  ('road', 'qwen2', 'Road', {'target_modules': Q, 'group_size': 4}),
  ('vblora', 'llama', 'VBLoRA', {
    'target_modules': Q, 'num_vectors': 10, 'vector_length': 8,
    'save_only_topk_weights': True,
  }),
  ('randlora', 'llama', 'RandLora', {'target_modules': Q, 'r': 4}),
  ('norms', 'llama', 'LNTuning', {'target_modules': ['input_layernorm']}),
  ('rows', 'llama', 'TrainableTokens', {
    'target_modules': ['embed_tokens'], 'token_indices': [5, 2],
  }),
)  # fmt: skip


def make(name):
  """A model of transformers with random numbers."""
  architecture, config, settings = MODELS[name]
  config = getattr(transformers, config)(**settings)
  if hasattr(config, 'tie_word_embeddings'):
    config.tie_word_embeddings = False
  torch.manual_seed(0)
  model = getattr(transformers, architecture)(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.copy_(0.3 * torch.randn_like(parameter))
  return model


def save(model, folder):
  """As transformers saves it, or as it is where that fails."""
  try:
    model.save_pretrained(folder)
  except AttributeError:
    from safetensors.torch import save_file  # pylint: disable=g-import-not-at-top

    save_file(model.state_dict(), folder / 'model.safetensors')


class WithPeftTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    transformers.logging.set_verbosity_error()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.named_parameters(*CASES)
  def test_folded_equals_merged(self, model, config, settings):
    path = self.folder
    base = make(model)
    base.save_pretrained(path / 'base')
    load = type(base).from_pretrained
    tuned = peft.get_peft_model(
      load(path / 'base', dtype=torch.float32),
      getattr(peft, f'{config}Config')(**settings),
    )
    with torch.no_grad():
      for parameter in tuned.parameters():
        if parameter.requires_grad:
          parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(path / 'adapter')
    merged = peft.PeftModel.from_pretrained(
      load(path / 'base', dtype=torch.float32), path / 'adapter'
    ).merge_and_unload()
    save(merged, path / 'merged')
    plain = checkpoint.open_checkpoint(path / 'base')
    store = fold.AdapterStore(plain, str(path / 'adapter'))
    got = tree_lib.flatten(store.read())
    before = tree_lib.flatten(plain.read())
    expected = checkpoint.open_checkpoint(path / 'merged').read()
    changed = 0
    for name, leaf in tree_lib.flatten(expected).items():
      # PEFT decomposes in float32, which costs it up to 1e-5.
      np.testing.assert_allclose(got[name], leaf, atol=2e-5, err_msg=name)
      if name in before and before[name].shape == leaf.shape:
        changed += np.abs(before[name] - leaf).max() > 1e-4
    self.assertGreater(changed, 0)

  @parameterized.parameters('llama', 'gpt2', 'bert', 'resnet')
  def test_extracted_adapters_load(self, model):
    path = self.folder
    base = make(model)
    base.save_pretrained(path / 'base')
    expected = make(model)
    with torch.no_grad():
      for name, parameter in expected.named_parameters():
        if parameter.ndim == 2 and not any(
          word in name for word in ('embed', 'wte', 'wpe', 'lm_head')
        ):
          parameter.add_(0.1 * torch.randn_like(parameter))
    expected.save_pretrained(path / 'tuned')
    extract.extract_lora(path / 'tuned', path / 'base', path / 'lora', rank=20)
    plain = type(base).from_pretrained(path / 'base', dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(plain, path / 'lora')
    merged = merged.merge_and_unload().state_dict()
    for name, leaf in expected.state_dict().items():
      np.testing.assert_allclose(
        merged[name].numpy(), leaf.numpy(), atol=1e-5, err_msg=name
      )

  def test_every_kind_is_folded_or_has_a_reason(self):
    known = {*kinds.KINDS, *kinds.REFUSED}
    self.assertEqual({kind.value for kind in peft.PeftType} - known, set())

  def test_settings_of_lora_are_known(self):
    plain = peft.LoraConfig(target_modules=Q).to_dict()
    self.assertIsNone(lora.refuse(plain))
    self.assertEqual(set(plain) - lora.KNOWN - set(lora.REASONS), set())


if __name__ == '__main__':
  absltest.main()
