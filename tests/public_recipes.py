# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes of the shapes that people publish, and small models to merge."""

import json
import pathlib

import numpy as np
import yaml

import mergejax as mj

LAYERS, WIDTH, VOCAB = 4, 8, 8
MODELS = ('A', 'B', 'C', 'BASE')

# name: recipe with the names of the models
RECIPES = yaml.safe_load(
  pathlib.Path(__file__).with_suffix('.yaml').read_text(encoding='utf-8')
)
# Whose results no seed of ours can share with mergekit.
RANDOM = ('dare_ties stack', 'dare_linear', 'della')
# Whose embeddings are matched by token.
BY_TOKEN = (
  'self-merge', 'template by name', 'template of most', 'tokens from elsewhere',
)  # fmt: skip


def model(seed, dtype=np.float32):
  """`{name: array}`; every matrix is square, so few programs are compiled."""
  rng = np.random.default_rng(seed)
  names = ['embed_tokens', 'norm'] + [
    f'layers.{i}.{part}'
    for i in range(LAYERS)
    for part in (
      *(f'self_attn.{n}_proj' for n in 'qkvo'),
      *(f'mlp.{n}_proj' for n in ('gate', 'up', 'down')),
      'input_layernorm', 'post_attention_layernorm',
    )
  ]  # fmt: skip
  shapes = {
    f'model.{n}.weight': (WIDTH,) if 'norm' in n else (WIDTH, WIDTH)
    for n in names
  } | {'lm_head.weight': (VOCAB, WIDTH)}
  return {
    name: (rng.normal(size=shape) * 0.1).astype(dtype)
    for name, shape in shapes.items()
  }


def save_models(folder: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """Writes the four models as transformers would; returns their arrays."""
  config = {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
    'hidden_size': WIDTH, 'intermediate_size': WIDTH, 'vocab_size': VOCAB,
    'num_hidden_layers': LAYERS, 'num_attention_heads': 2,
    'num_key_value_heads': 2, 'tie_word_embeddings': False,
    'rms_norm_eps': 1e-6, 'torch_dtype': 'float32',
  }  # fmt: skip
  vocabulary = {f't{i}': i for i in range(VOCAB - 1)} | {'<unk>': VOCAB - 1}
  tokenizer = {
    'version': '1.0',
    'added_tokens': [],
    'model': {
      'type': 'WordLevel', 'vocab': vocabulary, 'unk_token': '<unk>',
    },
  }  # fmt: skip
  result = {}
  for seed, name in enumerate(MODELS):
    result[name] = model(seed)
    mj.save_checkpoint(
      folder / name, result[name], 'safetensors', config=config
    )
    (folder / name / 'tokenizer.json').write_text(json.dumps(tokenizer))
    template = (
      'common {{ messages }} of most' if name in 'AB' else 'rare {{ 1 }}'
    )
    settings = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'unk_token': '<unk>',
      'chat_template': template,
    }
    (folder / name / 'tokenizer_config.json').write_text(json.dumps(settings))
  return result


def load(name: str, folder: pathlib.Path) -> dict:
  """A recipe with the folders of the models in it."""

  def placed(node):
    if isinstance(node, dict):
      return {key: placed(value) for key, value in node.items()}
    if isinstance(node, list):
      return [placed(value) for value in node]
    if isinstance(node, str) and node.partition('@')[0] in MODELS:
      return str(folder / node)
    return node

  return placed(RECIPES[name])
