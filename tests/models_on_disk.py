# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small models in the format of Hugging Face, for tests of whole merges."""

import json
import pathlib
import shutil

from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.core import tree as tree_lib


def llama(rng, dtype=np.float32, *, vocab=40, width=12, layers=3, tied=False):
  """`{name: array}` of a decoder with the names of Llama."""
  shapes = {'model.embed_tokens.weight': (vocab, width)}
  for i in range(layers):
    layer = f'model.layers.{i}'
    shapes[f'{layer}.self_attn.q_proj.weight'] = (width, width)
    shapes[f'{layer}.mlp.up_proj.weight'] = (2 * width + 1, width)
    shapes[f'{layer}.mlp.down_proj.weight'] = (width, 2 * width + 1)
    shapes[f'{layer}.input_layernorm.weight'] = (width,)
  shapes['model.norm.weight'] = (width,)
  if not tied:
    shapes['lm_head.weight'] = (vocab, width)
  return {
    name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()
  }


def save(folder: pathlib.Path, model, tokens=None, **config):
  """Writes a model with its side-car files, replacing what was there."""
  shutil.rmtree(folder, ignore_errors=True)
  layers = {name.split('.')[2] for name in model if '.layers.' in name}
  mj.save_checkpoint(
    folder,
    model,
    'safetensors',
    config={
      'architectures': ['LlamaForCausalLM'],
      'model_type': 'llama',
      'num_hidden_layers': len(layers),
      'vocab_size': model['model.embed_tokens.weight'].shape[0],
      'tie_word_embeddings': 'lm_head.weight' not in model,
      'torch_dtype': model['model.norm.weight'].dtype.name,
      **config,
    },
  )
  vocabulary = tokens or {
    f't{i}': i for i in range(model['model.embed_tokens.weight'].shape[0])
  }
  tokenizer = {'version': '1.0', 'model': {'type': 'BPE', 'vocab': vocabulary}}
  (folder / 'tokenizer.json').write_text(json.dumps(tokenizer))
  (folder / 'generation_config.json').write_text('{"eos_token_id": 2}')


def statistics(kind, model, rng):
  """Statistics of every leaf ('fisher') or every linear kernel ('gram')."""
  if kind == 'fisher':
    return {
      p: {'fisher': rng.gamma(1.0, size=leaf.shape).astype(np.float32)}
      for p, leaf in model.items()
    }
  result = {}
  for path, leaf in model.items():
    if 'proj' in path:
      inputs = rng.normal(size=(50, leaf.shape[1]))
      gram = (inputs.T @ inputs / 50).astype(np.float32)
      result[path] = {'gram': gram}
  return result


class TestCase(parameterized.TestCase):
  """Three decoders on disk, `base`, `a` and `b`, and recipes of them."""

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    self.models = {}
    for name in ('base', 'a', 'b'):
      self.models[name] = llama(rng)
      save(self.folder / name, self.models[name])

  def path(self, name):
    return str(self.folder / name)

  def recipe(self, method='linear', names=('a', 'b'), base=None, **more):
    recipe = {
      'merge_method': method,
      'models': [{'model': self.path(n)} for n in names],
    }
    if base:
      recipe['base_model'] = self.path(base)
    return {**recipe, **more}

  def merged(self, recipe, name='out'):
    mj.execute(mj.plan(recipe), self.folder / name)
    return tree_lib.flatten(mj.open_checkpoint(self.folder / name).read())
