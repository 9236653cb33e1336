# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5 in Hugging Face checkpoints and in T5X's tree, both ways.

One table serves both directions. PyTorch stores `Linear` as `[out, in]` and
the relative-position table as `[buckets, heads]`, so those are transposed;
embeddings and norm scales are not.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import typing
from mergejax.models import base
from mergejax.names import t5

_T = True  # transposed


def _attention(hf, ours):
  return [
    (f'{hf}.{short}.weight', f'{ours}/{long}/kernel', _T)
    for short, long in zip('qkvo', ('query', 'key', 'value', 'out'))
  ]


def _mlp(hf, ours):
  return [
    (f'{hf}.{name}.weight', f'{ours}/{name}/kernel', _T)
    for name in ('wi', 'wi_0', 'wi_1', 'wo')
  ]


def _layer(stack, parts):
  rows = []
  for j, (kind, ours, norm) in enumerate(parts):
    hf = f'{stack}.block.{{i}}.layer.{j}'
    here = f'{stack}/layers_{{i}}'
    rows.append((f'{hf}.layer_norm.weight', f'{here}/{norm}/scale', False))
    make = _mlp if kind == 'DenseReluDense' else _attention
    rows += make(f'{hf}.{kind}', f'{here}/{ours}')
  rows.append(
    (
      f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      f'{stack}/relpos_bias/rel_embedding',
      _T,
    )
  )
  norm = f'{stack}.final_layer_norm.weight'
  rows.append((norm, f'{stack}/{stack}_norm/scale', False))
  return rows


# (Hugging Face name, T5X path, transposed); {i} is a layer number.
TABLE = (
  [('shared.weight', 'token_embedder/embedding', False)]
  + _layer(
    'encoder',
    [
      ('SelfAttention', 'attention', 'pre_attention_layer_norm'),
      ('DenseReluDense', 'mlp', 'pre_mlp_layer_norm'),
    ],
  )
  + _layer(
    'decoder',
    [
      (
        'SelfAttention',
        'self_attention',
        'pre_self_attention_layer_norm',
      ),
      (
        'EncDecAttention',
        'encoder_decoder_attention',
        'pre_cross_attention_layer_norm',
      ),
      ('DenseReluDense', 'mlp', 'pre_mlp_layer_norm'),
    ],
  )
  + [('lm_head.weight', 'decoder/logits_dense/kernel', _T)]
)

# Copies of `shared.weight` that some files repeat under other names.
TIED = {
  'encoder.embed_tokens.weight': 'shared.weight',
  'decoder.embed_tokens.weight': 'shared.weight',
}


def from_hf(
  leaves: Mapping[str, np.ndarray], *, tied_head: bool
) -> dict[typing.Path, np.ndarray]:
  """Renames a Hugging Face T5 to T5X's tree.

  Args:
    leaves: `{name: array}` as stored.
    tied_head: the head is the embedding (T5 1.0, `tie_word_embeddings`): a
      stored `lm_head.weight` is then a repeated embedding and is left out.

  Returns:
    `{path: array}`, kernels as `[in, out]`.

  Raises:
    UserError: a name the table does not know, or a tied copy that differs
      from what it should repeat.
  """
  tied = dict(
    TIED, **({'lm_head.weight': 'shared.weight'} if tied_head else {})
  )
  result = {}
  for name, leaf in leaves.items():
    if name in tied:
      if not np.array_equal(leaf, leaves[tied[name]]):
        raise errors.CheckpointError(
          f'{name} should repeat {tied[name]} but differs from it. If the '
          "model's head is its own, set tie_word_embeddings to false in "
          'config.json.'
        )
      continue
    path, transposed = _translate(name, 0)
    result[path] = leaf.T if transposed else leaf
  return result


def to_hf(leaves: Mapping[typing.Path, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames T5X's tree to a Hugging Face T5; the inverse of `from_hf`."""
  result = {}
  for path, leaf in leaves.items():
    name, transposed = _translate(path, 1)
    result[name] = leaf.T if transposed else leaf
  return result


def _translate(name, side):
  for row in TABLE:
    pattern = re.escape(row[side]).replace(r'\{i\}', r'(\d+)')
    match = re.fullmatch(pattern, name)
    if match:
      number = match[1] if match.groups() else ''
      return row[1 - side].replace('{i}', number), row[2]
  raise errors.CheckpointError(
    f'{name!r} is not a parameter of T5. Expected names like '
    f'{TABLE[1][side].replace("{i}", "0")!r}.'
  )


def config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `T5Config` from a Hugging Face `config.json` of type `t5`."""
  feed_forward = config.get('feed_forward_proj', 'relu')
  activations = tuple(feed_forward.removeprefix('gated-').split('-'))
  if feed_forward.startswith('gated-'):
    activations += ('linear',)
  return dict(
    vocab_size=config['vocab_size'],
    emb_dim=config['d_model'],
    num_heads=config['num_heads'],
    num_encoder_layers=config['num_layers'],
    num_decoder_layers=config.get('num_decoder_layers') or config['num_layers'],
    head_dim=config['d_kv'],
    mlp_dim=config['d_ff'],
    mlp_activations=activations,
    logits_via_embedding=t5.has_tied_head(config),
    relative_buckets=config.get('relative_attention_num_buckets', 32),
    relative_max_distance=config.get('relative_attention_max_distance', 128),
  )


def config_to_hf(config: Mapping[str, Any]) -> dict[str, Any]:
  """A Hugging Face `config.json` from all fields of `T5Config`.

  Args:
    config: the fields; `config_from_hf` gives back those of the architecture.

  Raises:
    UserError: feed-forward activations that Hugging Face's T5 does not have.
  """
  activation, *rest = config['mlp_activations']
  if rest not in ([], ['linear']):
    raise errors.CheckpointError(
      f'mlp_activations {list(config["mlp_activations"])} has no name in '
      "Hugging Face's T5, which knows one activation, alone or times a linear "
      "map: ['relu'], ['gelu', 'linear']."
    )
  return dict(
    architectures=['T5ForConditionalGeneration'],
    model_type='t5',
    vocab_size=config['vocab_size'],
    d_model=config['emb_dim'],
    d_kv=config['head_dim'],
    d_ff=config['mlp_dim'],
    num_heads=config['num_heads'],
    num_layers=config['num_encoder_layers'],
    num_decoder_layers=config['num_decoder_layers'],
    feed_forward_proj=f'gated-{activation}' if rest else activation,
    tie_word_embeddings=config['logits_via_embedding'],
    relative_attention_num_buckets=config['relative_buckets'],
    relative_attention_max_distance=config['relative_max_distance'],
    dropout_rate=config['dropout_rate'],
    layer_norm_epsilon=1e-6,
    is_encoder_decoder=True,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
  )


CONVERSION = base.Conversion(
  't5',
  config_from_hf,
  config_to_hf,
  lambda leaves, config: from_hf(leaves, tied_head=t5.has_tied_head(config)),
  to_hf,
)
