# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5, mT5 and umT5 in Hugging Face checkpoints and in T5X's tree.

T5 1.0 and 1.1, Flan-T5 and ByT5 are `t5` there, mT5 is `mt5` with the same
names, and `umt5` has a table of relative positions in every layer
(`relative_per_layer`). One table serves both directions. PyTorch stores
`Linear` as `[out, in]` and the relative-position table as `[buckets, heads]`,
so those are transposed; embeddings and norm scales are not.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import typing
from mergejax.models import layer_stacks
from mergejax.models import outputs
from mergejax.names import t5 as t5_names
from mergejax.nn import t5

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
  bias = 'layer.0.SelfAttention.relative_attention_bias.weight'
  table = 'relpos_bias/rel_embedding'
  rows.append((f'{stack}.block.0.{bias}', f'{stack}/{table}', _T))
  rows.append(
    (f'{stack}.block.{{i}}.{bias}', f'{stack}/layers_{{i}}/{table}', _T)
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

# Cross-attention has no relative positions; T5 1.0's first files store a table
# for it all the same, and transformers leaves it out too.
_UNUSED = (
  'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
)
_HEAD, _EMBEDDING = 'lm_head.weight', 'shared.weight'
# Copies of `shared.weight` that some files repeat under other names.
TIED = {
  'encoder.embed_tokens.weight': 'shared.weight',
  'decoder.embed_tokens.weight': 'shared.weight',
}


def from_hf(
  leaves: Mapping[str, np.ndarray],
  *,
  tied_head: bool,
  per_layer: bool = False,
) -> dict[typing.Path, np.ndarray]:
  """Renames a Hugging Face T5 to T5X's tree.

  Args:
    leaves: `{name: array}` as stored.
    tied_head: the head is the embedding (T5 1.0, `tie_word_embeddings`): a
      stored `lm_head.weight` is then a repeated embedding and is left out.
    per_layer: every layer has a table of relative positions of its own (umT5).

  Returns:
    `{path: array}`, kernels as `[in, out]`, layers one by one.

  Raises:
    UserError: a name the table does not know, or a tied copy that differs
      from what it should repeat.
  """
  tied = dict(TIED, **({_HEAD: _EMBEDDING} if tied_head else {}))
  result = {}
  for name, leaf in leaves.items():
    if name == _UNUSED:
      continue
    if name in tied and tied[name] in leaves:
      if not np.array_equal(leaf, leaves[tied[name]]):
        raise errors.CheckpointError(
          f'{name} should repeat {tied[name]} but differs from it. If the '
          "model's head is its own, set tie_word_embeddings to false in "
          'config.json.'
        )
      continue
    path, transposed = _translate(name, 0, per_layer)
    result[path] = leaf.T if transposed else leaf
  return result


def to_hf(
  leaves: Mapping[typing.Path, np.ndarray], *, per_layer: bool = False
) -> dict[str, np.ndarray]:
  """Renames T5X's tree to a Hugging Face T5; the inverse of `from_hf`.

  Args:
    leaves: `{path: array}`; scanned layers are written one by one.
    per_layer: as umT5 has it: a table that all layers share is repeated.

  Raises:
    StructureError: tables of relative positions that differ by layer, for a
      model type that has one a stack.
  """
  apart = layer_stacks.restack(
    leaves, t5.T5Config(relative_per_layer=per_layer)
  )
  result = {}
  for path, leaf in apart.items():
    name, transposed = _translate(path, 1, per_layer)
    result[name] = leaf.T if transposed else leaf
  return result


def _translate(name, side, per_layer):
  for row in TABLE:
    # Of two rows for a table of relative positions, one is the model's.
    if 'relpos_bias' in row[1] and ('layers_' in row[1]) != per_layer:
      continue
    pattern = re.escape(row[side]).replace(r'\{i\}', r'(\d+)')
    match = re.fullmatch(pattern, name)
    if match:
      number = match[1] if match.groups() else ''
      return row[1 - side].replace('{i}', number), row[2]
  raise errors.CheckpointError(
    f'{name!r} is not a parameter of T5. Expected names like '
    f'{TABLE[1][side].replace("{i}", "0")!r}.'
  )


# What Hugging Face calls an activation -> what `jax.nn` calls it. Its `gelu` is
# the exact one, which T5 never has: `gated-gelu` means the approximation.
_ACTIVATIONS = {
  'relu': 'relu',
  'silu': 'silu',
  'swish': 'silu',
  'gelu_new': 'gelu',
  'tanh': 'tanh',
  'sigmoid': 'sigmoid',
}
_ARCHITECTURES = {
  't5': 'T5ForConditionalGeneration',
  'mt5': 'MT5ForConditionalGeneration',
  'umt5': 'UMT5ForConditionalGeneration',
}
# What their files always say.
_SIZES = ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_heads', 'num_layers')


def config_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `T5Config` from a Hugging Face `config.json` of these types.

  Raises:
    ConfigError: a size is missing, or an activation is not one of ours.
  """
  kind = config.get('model_type', 't5')
  missing = [name for name in _SIZES if name not in config]
  if missing:
    raise errors.ConfigError(
      f'The config.json of a {kind} model lacks {", ".join(missing)}: take the '
      'file that transformers wrote beside the weights.'
    )
  per_layer = {'relative_per_layer': True} if kind == 'umt5' else {}
  default = 'relu' if kind == 't5' else 'gated-gelu'
  return dict(
    vocab_size=config['vocab_size'],
    emb_dim=config['d_model'],
    num_heads=config['num_heads'],
    num_encoder_layers=config['num_layers'],
    num_decoder_layers=config.get('num_decoder_layers') or config['num_layers'],
    head_dim=config['d_kv'],
    mlp_dim=config['d_ff'],
    mlp_activations=_activations(config.get('feed_forward_proj', default)),
    logits_via_embedding=t5_names.has_tied_head(config),
    relative_buckets=config.get('relative_attention_num_buckets', 32),
    relative_max_distance=config.get('relative_attention_max_distance', 128),
    **per_layer,
  )


def _activations(feed_forward):
  """`('gelu', 'linear')` of `'gated-gelu'`."""
  gated = feed_forward.startswith('gated-')
  name = feed_forward.removeprefix('gated-')
  if gated and name == 'gelu':
    name = 'gelu_new'
  if name not in _ACTIVATIONS:
    raise errors.ConfigError(
      f'feed_forward_proj {feed_forward!r} is no activation of our T5; there '
      f'are {", ".join(_ACTIVATIONS)}, each also with "gated-" before it, and '
      'gated-gelu. (gelu alone is the exact one there, ours is gelu_new.)'
    )
  return (_ACTIVATIONS[name], *(['linear'] if gated else []))


def _feed_forward(activations):
  """The inverse of `_activations`."""
  activation, *rest = activations
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  if rest not in ([], ['linear']) or activation not in names:
    raise errors.CheckpointError(
      f'mlp_activations {list(activations)} has no name in '
      "Hugging Face's T5, which knows one activation, alone or times a linear "
      "map: ['relu'], ['gelu', 'linear']."
    )
  if not rest:
    return names[activation]
  return 'gated-gelu' if activation == 'gelu' else f'gated-{names[activation]}'


def config_to_hf(
  config: Mapping[str, Any], model_type: str = 't5'
) -> dict[str, Any]:
  """A Hugging Face `config.json` from all fields of `T5Config`.

  Args:
    config: the fields; `config_from_hf` gives back those of the architecture.
    model_type: 't5', 'mt5' or 'umt5'.

  Raises:
    UserError: feed-forward activations that Hugging Face's T5 does not have,
      layers with experts, or a head that is the embedding, for mT5.
  """
  if config.get('moe') is not None:
    raise errors.CheckpointError(
      "Hugging Face's T5 has no layers with experts (moe): keep the model in "
      'the names of T5X, or make it dense first (experts.to_dense).'
    )
  if model_type == 'mt5' and config['logits_via_embedding']:
    raise errors.CheckpointError(
      'logits_via_embedding=True: mT5 has a head of its own, and transformers '
      'does not scale it. Write this model as hf-t5.'
    )
  return dict(
    architectures=[_ARCHITECTURES[model_type]],
    model_type=model_type,
    vocab_size=config['vocab_size'],
    d_model=config['emb_dim'],
    d_kv=config['head_dim'],
    d_ff=config['mlp_dim'],
    num_heads=config['num_heads'],
    num_layers=config['num_encoder_layers'],
    num_decoder_layers=config['num_decoder_layers'],
    feed_forward_proj=_feed_forward(config['mlp_activations']),
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


def _read(leaves, config):
  """`from_hf`, as a model's configuration says."""
  tied = t5_names.has_tied_head(config)
  own = _HEAD in leaves or _EMBEDDING not in leaves
  if not (own or tied) and config.get('tie_word_embeddings'):
    # transformers 5 ties without scaling: a head of its own, of equal numbers.
    leaves = {**leaves, _HEAD: leaves[_EMBEDDING]}
  return from_hf(
    leaves, tied_head=tied, per_layer=config.get('model_type') == 'umt5'
  )


def _conversion(model_type):
  per_layer = model_type == 'umt5'
  return outputs.Conversion(
    model_type,
    config_from_hf,
    lambda config: config_to_hf(config, model_type),
    _read,
    lambda leaves: to_hf(leaves, per_layer=per_layer),
  )


# By what the command line calls them; all of them read any of the types.
CONVERSIONS = {f'hf-{name}': _conversion(name) for name in t5_names.MODEL_TYPES}
