# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes of the shapes that people publish, and small models to merge.

Written for these tests. `A`, `B`, `C` and `BASE` stand for the models' folders,
which hold decoders with the names of Llama.
"""

import json
import pathlib

import numpy as np
import yaml

import mergejax as mj

LAYERS, WIDTH, VOCAB = 4, 8, 8
MODELS = ('A', 'B', 'C', 'BASE')

RECIPES = {
  'linear soup': """
    models:
      - model: A
        parameters: {weight: 1.0}
      - model: B
        parameters: {weight: 0.3}
      - model: C
        parameters: {weight: 0.5}
    merge_method: linear
    dtype: float16
  """,
  'linear, negative weight, no normalisation': """
    models:
      - {model: A, parameters: {weight: 1.2}}
      - {model: B, parameters: {weight: -0.2}}
    merge_method: linear
    parameters: {normalize: false}
    dtype: float32
  """,
  'linear, long gradients': """
    models:
      - model: A
        parameters:
          weight: [1, 0.95, 0.9, 0.6, 0.3, 0.1, 0]
      - model: B
        parameters:
          weight: [0, 0.05, 0.1, 0.4, 0.7, 0.9, 1]
    merge_method: linear
    dtype: float32
  """,
  'linear, stray words': """
    models:
      - model: A
        parameters: {weight: 0.6, density: 0.5}
      - model: B
        parameters: {weight: 0.4}
    merge_method: linear
    parameters: {int8_mask: true, normalize: 1.0}
    model_name: soup-of-two
    dtype: torch.bfloat16
  """,
  'linear, base and one weight for all': """
    models:
      - model: A
      - model: B
    merge_method: linear
    base_model: BASE
    parameters: {weight: 1.0}
    dtype: float32
  """,
  'linear, base among the models': """
    models:
      - {model: BASE, parameters: {weight: 2}}
      - {model: B, parameters: {weight: '1'}}
    merge_method: linear
    base_model: BASE
    out_dtype: float32
  """,
  'slerp of slices, the classic': """
    slices:
      - sources:
          - {model: A, layer_range: [0, 4]}
          - {model: B, layer_range: [0, 4]}
    merge_method: slerp
    base_model: A
    parameters:
      t:
        - filter: self_attn
          value: [0, 0.5, 0.3, 0.7, 1]
        - filter: mlp
          value: [1, 0.5, 0.7, 0.3, 0]
        - value: 0.5
    dtype: bfloat16
  """,
  'slerp of models, words of older files': """
    models:
      - model: A
      - model: B
    merge_method: slerp
    base_model: A
    parameters:
      t: 0.35
      embed_slerp: true
    dtype: float32
  """,
  'slerp, ends by name': """
    models: [{model: A}, {model: B}]
    merge_method: slerp
    base_model: B
    parameters:
      t:
        - {filter: embed_tokens, value: 0.0}
        - {filter: lm_head, value: 1}
        - {filter: q_proj, value: [0.1, 0.9]}
        - value: [0.2, 0.8, 0.4]
    dtype: float32
  """,
  'slerp, slices with their own t': """
    slices:
      - sources:
          - {model: A, layer_range: [0, 2]}
          - {model: B, layer_range: [0, 2]}
        parameters: {t: 0.2}
      - sources:
          - {model: A, layer_range: [2, 4]}
          - {model: B, layer_range: [1, 3]}
    merge_method: slerp
    base_model: A
    parameters: {t: [0.5, 0.9]}
    dtype: float32
  """,
  'ties, the classic': """
    models:
      - model: BASE
      - model: A
        parameters: {density: 0.5, weight: 0.5}
      - model: B
        parameters: {density: 0.5, weight: 0.3}
    merge_method: ties
    base_model: BASE
    parameters: {normalize: true, int8_mask: true}
    dtype: float32
  """,
  'ties, gradients and filters': """
    models:
      - model: A
        parameters:
          density: [1, 0.7, 0.1]
          weight: 1.0
      - model: B
        parameters:
          density: 0.5
          weight: [0, 0.3, 0.7, 1]
      - model: C
        parameters:
          density: 0.33
          weight:
            - filter: mlp
              value: 0.5
            - value: 0
    merge_method: ties
    base_model: BASE
    parameters: {normalize: true, int8_mask: true}
    dtype: float32
  """,
  'ties, density from 0': """
    models:
      - {model: A, parameters: {weight: 1.0, density: [0, 0.25, 0.5, 1]}}
      - {model: B, parameters: {weight: 1.0, density: [1, 0.5, 0.25, 0]}}
    merge_method: ties
    base_model: BASE
    parameters: {normalize: 1.0, lambda: 0.8}
    dtype: float32
  """,
  'ties, quoted words': """
    models:
      - {model: A, parameters: {weight: '0.7', density: '5e-1'}}
      - {model: B, parameters: {weight: 1, density: 1}}
    merge_method: ties
    base_model: BASE
    parameters: {normalize: 'false', lambda: '1.5'}
    dtype: float32
  """,
  'ties, rescaled': """
    models:
      - {model: A, parameters: {weight: 0.5, density: 0.4}}
      - {model: B, parameters: {weight: 0.5, density: 0.6}}
    merge_method: ties
    base_model: BASE
    parameters: {normalize: false, rescale: true}
    dtype: float32
  """,
  'dare_ties stack': """
    models:
      - model: BASE
        # no parameters necessary for the base
      - model: A
        parameters: {density: 0.53, weight: 0.4}
      - model: B
        parameters: {density: 0.53, weight: 0.3}
      - model: C
        parameters: {density: 0.53, weight: 0.3}
    merge_method: dare_ties
    base_model: BASE
    parameters: {int8_mask: true}
    dtype: float32
    random_seed: 0
  """,
  'dare_ties, everything kept': """
    models:
      - {model: A, parameters: {density: 1, weight: [0.9, 0.1]}}
      - {model: B, parameters: {density: 1.0, weight: [0.1, 0.9]}}
    merge_method: dare_ties
    base_model: BASE
    parameters: {normalize: false, rescale: false}
    dtype: float32
  """,
  'dare_linear': """
    models:
      - {model: A, parameters: {density: 0.6, weight: 0.6}}
      - {model: B, parameters: {density: 0.4, weight: 0.4}}
    merge_method: dare_linear
    base_model: BASE
    parameters: {normalize: true, lambda: 1.1, rescale: 'yes'}
    dtype: float32
  """,
  'della': """
    models:
      - {model: A, parameters: {weight: 0.5, density: 0.7, epsilon: 0.1}}
      - {model: B, parameters: {weight: 0.5, density: 0.5, epsilon: 0.2}}
    merge_method: della
    base_model: BASE
    parameters: {lambda: 1.0, normalize: false, int8_mask: true}
    dtype: float32
  """,
  'della_linear, everything kept': """
    models:
      - {model: A, parameters: {weight: 0.7, density: 1.0, epsilon: 0.05}}
      - {model: B, parameters: {weight: 0.3, density: 1.0}}
    merge_method: della_linear
    base_model: BASE
    parameters: {epsilon: 0.1, lambda: 0.9}
    dtype: float32
  """,
  'breadcrumbs': """
    models:
      - {model: A, parameters: {weight: 1.0, density: 0.9, gamma: 0.1}}
      - {model: B, parameters: {weight: 0.5, density: 0.5}}
    merge_method: breadcrumbs
    base_model: BASE
    parameters: {gamma: 0.05}
    dtype: float32
  """,
  'breadcrumbs_ties, per layer': """
    models:
      - model: A
        parameters:
          weight: [0.4, 0.1, 0.5]
          density: 0.9
          gamma: 0.01
      - model: B
        parameters: {weight: 0.8, density: 0.6, gamma: 0.2}
    merge_method: breadcrumbs_ties
    base_model: BASE
    dtype: float32
  """,
  'model_stock': """
    models:
      - model: A
      - model: B
      - model: C
    merge_method: model_stock
    base_model: BASE
    parameters: {normalize: true}
    dtype: bfloat16
  """,
  'model_stock by filter': """
    models: [{model: A}, {model: B}, {model: BASE}]
    merge_method: model_stock
    base_model: BASE
    parameters: {filter_wise: 1}
    dtype: float32
  """,
  'task arithmetic, a vector taken away': """
    models:
      - {model: A, parameters: {weight: 1.0}}
      - {model: B, parameters: {weight: -0.5}}
    merge_method: task_arithmetic
    base_model: BASE
    parameters: {int8_mask: true, density: 0.5, lambda: 0.6}
    dtype: float32
  """,
  'task arithmetic, normalised': """
    models:
      - {model: A, parameters: {weight: 0.35, density: 0.65}}
      - {model: B, parameters: {weight: [0.2, 0.4]}}
    merge_method: task_arithmetic
    base_model: BASE
    parameters: {normalize: true}
    dtype: float32
  """,
  'sce, words of other methods': """
    models:
      - {model: A, parameters: {weight: 0.9, density: 0.9}}
      - {model: B}
    merge_method: sce
    base_model: BASE
    parameters:
      select_topk: 0.4
      normalize: true
      lambda: 1.0
      int8_mask: true
    dtype: float32
  """,
  'nuslerp': """
    models:
      - {model: A, parameters: {weight: 0.4}}
      - {model: B, parameters: {weight: [0.6, 0.2]}}
    merge_method: nuslerp
    dtype: float32
  """,
  'nuslerp of task vectors by row': """
    models:
      - {model: A, parameters: {weight: 1}}
      - {model: B, parameters: {weight: 3}}
    merge_method: nuslerp
    base_model: BASE
    parameters: {nuslerp_flatten: 0, nuslerp_row_wise: false}
    dtype: float32
  """,
  'multislerp': """
    models:
      - {model: A, parameters: {weight: 0.5}}
      - {model: B, parameters: {weight: 0.3}}
      - {model: C, parameters: {weight: 0.2}}
    merge_method: multislerp
    parameters: {normalize_weights: 'true', eps: 1e-8}
    dtype: float32
  """,
  'karcher': """
    models: [{model: A}, {model: B}, {model: C}]
    merge_method: karcher
    parameters: {max_iter: 10.0, tol: 1e-5}
    dtype: float32
  """,
  'nearswap': """
    models: [{model: A}, {model: BASE}]
    merge_method: nearswap
    base_model: BASE
    parameters: {t: 0.05}
    dtype: float32
  """,
  'arcee_fusion': """
    models: [{model: BASE}, {model: A}]
    merge_method: arcee_fusion
    base_model: BASE
    dtype: float32
  """,
  'ram': """
    models: [{model: A}, {model: B}]
    merge_method: ram
    base_model: BASE
    parameters: {epsilon: 0.05}
    dtype: float32
  """,
  'ramplus': """
    models: [{model: A}, {model: B}, {model: C}]
    merge_method: ramplus_tl
    base_model: BASE
    parameters: {r: 0.2, alpha: '0.3', epsilon: 5e-2}
    dtype: float32
  """,
  'frankenmerge': """
    slices:
      - sources:
          - model: A
            layer_range: [0, 3]
      - sources:
          - model: B
            layer_range: [1, 4]
    merge_method: passthrough
    dtype: float16
  """,
  'self-merge': """
    merge_method: passthrough
    slices:
      - sources: [{layer_range: [0, 2], model: A}]
      - sources: [{layer_range: [1, 3], model: A}]
      - sources: [{layer_range: [2, 4], model: A}]
    dtype: bfloat16
    tokenizer_source: base
  """,
  'expansion with silent layers': """
    slices:
      - sources:
          - {model: A, layer_range: [0, 2]}
      - sources:
          - model: A
            layer_range: [1, 2]
            parameters:
              scale:
                - {filter: o_proj, value: 0.0}
                - {filter: down_proj, value: 0.0}
                - value: 1.0
      - sources:
          - {model: A, layer_range: [2, 4]}
    merge_method: passthrough
    dtype: float32
  """,
  'stack with layers of its own names': """
    slices:
      - sources:
          - model: A
            layer_range: [2, 4]
            parameters:
              scale: [{filter: layers.3., value: 0.5}, {value: 2}]
      - sources: [{model: B, layer_range: [0, 2]}]
    merge_method: passthrough
    dtype: float32
  """,
  'anchors with a holder': """
    attenuate: &quiet
      scale:
        - {filter: q_proj, value: 0.7}
        - {filter: k_proj, value: 0.7}
        - {value: 1.0}
    const_tag: &model A
    slices:
      - sources: [{model: *model, layer_range: [0, 2]}]
      - sources:
          - model: *model
            layer_range: [1, 3]
            parameters:
              <<: *quiet
      - sources: [{model: *model, layer_range: [2, 4]}]
    merge_method: passthrough
    dtype: float32
  """,
  'linear slices of two sources': """
    slices:
      - sources:
          - {model: A, layer_range: [0, 2], parameters: {weight: 0.75}}
          - {model: B, layer_range: [2, 4], parameters: {weight: 0.25}}
        residual_weight: 0.1
      - sources:
          - {model: C, layer_range: [2, 4], parameters: {weight: [0, 1]}}
          - {model: B, layer_range: [0, 2], parameters: {weight: 1}}
    merge_method: linear
    dtype: float32
  """,
  'ties slices with a base among them': """
    slices:
      - sources:
          - {model: BASE, layer_range: [0, 4]}
          - model: A
            layer_range: [0, 4]
            parameters: {density: [0.2, 0.8], weight: 1}
          - {model: B, layer_range: [0, 4], parameters: {weight: 0.5}}
        parameters: {density: 0.5}
    merge_method: ties
    base_model: BASE
    dtype: float32
  """,
  'long names, revisions, wide result': """
    models:
      - model: {model: {path: A, revision: main}}
        parameters: {weight: 0.5}
      - model: B@v1.0
        parameters: {weight: 0.5}
    merge_method: linear
    dtype: float64
  """,
  'template by name': """
    models: [{model: A, parameters: {weight: 1}}]
    merge_method: linear
    chat_template: chatml
    tokenizer_source: base
    base_model: A
    dtype: float32
  """,
  'template of most': """
    models: [{model: A}, {model: B}, {model: C}]
    merge_method: model_stock
    base_model: BASE
    chat_template: auto
    tokenizer: {}
    dtype: float32
  """,
  'tokens from elsewhere': """
    models:
      - {model: A, parameters: {weight: 0.5}}
      - {model: B, parameters: {weight: 0.5}}
    merge_method: linear
    base_model: A
    tokenizer:
      source: union
      pad_to_multiple_of: 4
      tokens:
        <|im_start|>:
          source: {kind: model_token, model: B, token: t3}
        <|pad|>:
          source: {kind: zero}
        t1: {source: B, force: true}
    dtype: float32
  """,
}  # fmt: skip
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

  return placed(yaml.safe_load(RECIPES[name]))
