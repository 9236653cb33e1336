# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`config.json` of a result: the reference's, made true of the new weights."""

from collections.abc import Iterator, Mapping
import copy
import re
from typing import Any

from mergejax.merging.disk import layer_configs

_VOCABULARY = ('vocab_size', 'decoder_vocab_size')
_DTYPES = ('dtype', 'torch_dtype')  # transformers 5, and before
_QUANTISED = ('quantization_config', 'compression_config')
_TOKEN = re.compile(r'\w+_token_(id|index)')
# A model's language part, as multimodal configurations call it.
_LANGUAGE = re.compile(r'(text|llm|language|language_model|decoder)_config')


def changed(
  config: Mapping[str, Any], changes: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
  """A configuration with all that a merge changes, in its nested parts too.

  Args:
    config: the reference's `config.json`.
    changes: new values by name; dots lead into sections. `vocab_size` is
      changed wherever it counts the same embedding.
    dtype: dtype of all floating weights of the result, put wherever the
      configuration names one; None to leave it.

  Returns:
    The new configuration. What it says of quantisation is gone, as only plain
    weights are merged.

  Example:
    >>> changed({'text_config': {'dtype': 'float32'}}, {}, 'bfloat16')
    {'text_config': {'dtype': 'bfloat16'}}
  """
  result = copy.deepcopy(dict(config))
  for part in _parts(result):
    for key in _QUANTISED:
      part.pop(key, None)
    for key in _DTYPES:
      if dtype is not None and isinstance(part.get(key), str):
        part[key] = dtype
  rows = changes.get('vocab_size')
  if rows is not None:
    _set_rows(result, rows)
  others = {key: one for key, one in changes.items() if key != 'vocab_size'}
  return layer_configs.changed(result, others)


def renumbered(
  config: Mapping[str, Any], before: Mapping[str, int], after: Mapping[str, int]
) -> dict[str, Any]:
  """A configuration whose special tokens are found in another vocabulary.

  Args:
    config: `config.json` or `generation_config.json`.
    before: `{token: row}` that its `..._token_id` and `..._token_index` are of.
    after: `{token: row}` of the tokenizer that it shall go with.

  Returns:
    The configuration with the rows of the same tokens; None for a token that
    the new tokenizer lacks.

  Example:
    >>> renumbered({'eos_token_id': [1, 2]}, {'a': 1, 'b': 2}, {'b': 0, 'a': 5})
    {'eos_token_id': [5, 0]}
  """
  tokens = {row: token for token, row in before.items()}

  def renumber(row):
    if type(row) is not int or row not in tokens:
      return row
    return after.get(tokens[row])

  result = copy.deepcopy(dict(config))
  for part in _parts(result):
    for key, value in part.items():
      if _TOKEN.fullmatch(key):
        several = isinstance(value, list)
        part[key] = [*map(renumber, value)] if several else renumber(value)
  return result


def _set_rows(config, rows):
  """Puts the number of embedding rows where it stands."""
  parts = [part for part in _parts(config) if _counts(part)]
  if not parts:
    return
  language = [
    part
    for name, part in _named_parts(config)
    if _LANGUAGE.fullmatch(name) and _counts(part)
  ]
  # The top level counts the embedding, else the language part does. Others
  # may have vocabularies of their own, such as codes of images.
  leader = config if _counts(config) else (language or parts)[0]
  before = set(_counts(leader).values())
  for part in parts:
    for key, value in _counts(part).items():
      if value in before:
        part[key] = rows


def _counts(part):
  return {
    key: part[key] for key in _VOCABULARY if isinstance(part.get(key), int)
  }


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
  return (part for _, part in _named_parts(config))


def _named_parts(config, name=''):
  yield name, config
  for key, value in list(config.items()):
    if isinstance(value, dict):
      yield from _named_parts(value, key)
