# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a `config.json` says of layers, after layers were chosen and stacked.

The number of layers has many names and may lie in a section (`text_config`);
beside it stand lists of one entry a layer (`layer_types`), lists of layer
numbers (`mlp_only_layers`), and numbers that say which layers are special.
"""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

Config = Mapping[str, Any] | None

# Sections that a module's configuration may lie in; '' is the file itself.
_SECTIONS = {
  'default': ('', 'text_config', 'language_config', 'llm_config'),
  'text_decoder': ('text_config', 'language_config', 'llm_config', ''),
  'vision_tower': ('vision_config',),
  'audio_tower': ('audio_config',),
}
_COUNTS = {
  'encoder': (
    'encoder_layers', 'num_encoder_layers', 'num_layers', 'num_hidden_layers',
  ),
  'decoder': ('decoder_layers', 'num_decoder_layers'),
}  # fmt: skip
_COUNTS_OF_ONE = (
  'num_hidden_layers', 'num_layers', 'n_layer', 'n_layers', 'depth',
)  # fmt: skip
# One entry a layer, if there are as many as layers.
_PER_LAYER = re.compile(
  r'(\w+_)?(layers?|blocks?)(_\w+)?|num_(key_value|attention|query|kv)_heads|'
  r'(ffn_)?intermediate_sizes?|ffn_multipliers|hybrid_override_pattern'
)
_NUMBERS_OF_LAYERS = (
  'mlp_only_layers', 'moe_layers', 'hybrid_layer_ids', 'attn_layer_indices',
  'full_attn_idxs', 'global_attn_indexes', 'cross_attention_layers',
  'deepstack_visual_indexes', 'fullatt_block_indexes',
)  # fmt: skip
_BY_NUMBER = (
  'sliding_window_pattern', 'global_attn_every_n_layers', 'max_window_layers',
  'full_attention_interval', 'first_k_dense_replace', 'moe_layer_freq',
  'interleave_moe_layer_step', 'decoder_sparse_step', 'attn_layer_period',
  'expert_layer_period', 'no_rope_layer_interval',
)  # fmt: skip
# Every n-th layer attends to everything, where the file does not say so.
_FULL_EVERY = {'gemma2': 2, 'gemma3_text': 6, 'cohere2': 4}


class Stack(NamedTuple):
  """Where the layers of a result come from.

  Attributes:
    module: which part of the model they are; see `names.modules.module_names`.
    order: `(model, number of the layer there)` of every layer.
    counts: `{model: number of its layers}`.
    other_side: layers of the reference's decoder, if it has one.
  """

  module: str
  order: tuple[tuple[str, int], ...]
  counts: Mapping[str, int]
  other_side: int = 0


def changes(
  reference: str, configs: Mapping[str, Config], stack: Stack
) -> tuple[dict[str, Any], list[str]]:
  """What changes in the reference's configuration.

  Args:
    reference: the model whose configuration the result has.
    configs: `{model: its config.json, or None}`.
    stack: where the layers come from.

  Returns:
    `({dotted name: value}, remarks)`: the number of layers, lists of one entry
    a layer with the entries of the layers that were chosen, and numbers of
    layers as they are now.

  Example:
    >>> config = {'num_hidden_layers': 2, 'layer_types': ['full', 'sliding']}
    >>> changes('a', {'a': config}, Stack('default', (('a', 1),), {'a': 2}))[0]
    {'num_hidden_layers': 1, 'layer_types': ['sliding']}
  """
  config = configs[reference]
  if config is None:
    return {}, []
  found: dict[str, Any] = {}
  remarks: list[str] = []
  for section in _SECTIONS.get(stack.module, ('',)):
    if section and not isinstance(config.get(section), Mapping):
      continue
    own = {n: _section(c, section) for n, c in configs.items()}
    prefix = f'{section}.' if section else ''
    for name, value in _counts(own[reference], stack).items():
      found[prefix + name] = value
    lists = _lists(reference, own, stack)
    found |= {prefix + name: value for name, value in lists.items()}
    special = [
      f'{name}: {own[reference][name]}'
      for name in _BY_NUMBER
      if own[reference].get(name)
      and 'layer_types' not in lists
      and not (name == 'max_window_layers' and not _has_window(own[reference]))
    ]
    moved = any(i != number for i, (_, number) in enumerate(stack.order))
    if special and moved:
      remarks.append(
        f'layers have other numbers now, and config.json says by number which '
        f'are special ({", ".join(special)}): check that it is what you want'
      )
  if not any(name.rsplit('.', 1)[-1] in _all_counts() for name in found):
    remarks.append(
      f'config.json does not tell the number of layers of the {stack.module}; '
      f'the result has {len(stack.order)}'
    )
  return found, remarks


def changed(config: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration with some values replaced or added.

  Args:
    config: a `config.json`; not changed itself.
    by: `{name: value}`; dots lead into sections, which exist.

  Example:
    >>> changed({'a': {'b': 1, 'c': 2}}, {'a.b': 3})
    {'a': {'b': 3, 'c': 2}}
  """
  result = dict(config)
  for name, value in by.items():
    section, dot, rest = name.partition('.')
    result[section] = changed(result[section], {rest: value}) if dot else value
  return result


def _has_window(config):
  return config.get('use_sliding_window', True)


def _section(config, section):
  found = (config or {}).get(section, {}) if section else config
  return found if isinstance(found, Mapping) else {}


def _all_counts():
  return {*_COUNTS['encoder'], *_COUNTS['decoder'], *_COUNTS_OF_ONE}


def _counts(config, stack):
  names = _COUNTS.get(stack.module, _COUNTS_OF_ONE)
  found = {n: len(stack.order) for n in names if config.get(n) is not None}
  if stack.module in _COUNTS and 'num_layers' in config:
    # T5: the decoder has as many as the encoder, unless it is said.
    if config.get('num_decoder_layers') is None:
      given = stack.module == 'decoder'
      count = len(stack.order) if given else stack.other_side
      found['num_decoder_layers'] = count
  return found


def _lists(reference, configs, stack):
  """Lists that speak of single layers, for the layers as they are now."""
  found = {}
  for name in dict.fromkeys([*configs[reference], 'layer_types']):
    own = {m: _list(configs[m], name, n) for m, n in stack.counts.items()}
    value = own[reference]
    if value is None:
      continue
    if name in _NUMBERS_OF_LAYERS:
      found[name] = [
        i for i, (m, layer) in enumerate(stack.order) if layer in (own[m] or ())
      ]
    elif _PER_LAYER.fullmatch(name) and len(value) == stack.counts[reference]:
      # A source that does not say has what the reference has there.
      entries = [
        own[m][layer]
        if own[m] is not None and len(own[m]) == stack.counts[m]
        else value[min(layer, len(value) - 1)]
        for m, layer in stack.order
      ]
      found[name] = ''.join(entries) if isinstance(value, str) else entries
  if 'attention_layers' in found and 'attention_types' in configs[reference]:
    found['attention_types'] = [[found['attention_layers'], 1]]
  return found


def _list(config, name, layers):
  """A list, or a text of one letter a layer; None if it is something else."""
  value = config.get(name)
  every = config.get('sliding_window_pattern') or _FULL_EVERY.get(
    config.get('model_type')
  )
  if name == 'layer_types' and value is None and isinstance(every, int):
    return [
      'sliding_attention' if (i + 1) % every else 'full_attention'
      for i in range(layers)
    ]
  return value if isinstance(value, (list, str)) else None
