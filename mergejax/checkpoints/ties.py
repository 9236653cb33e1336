# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of Hugging Face models that are one array under two names.

A checkpoint may store both names, or one: libraries differ, and versions of one
library do. Only content tells that a stored head is its embedding; names and
`config.json` tell that it should be.
"""

from collections.abc import Mapping
from typing import Any

from mergejax.core import typing
from mergejax.names import base
from mergejax.names import known
from mergejax.names import t5

# Architectures that end in a head over the vocabulary.
_WITH_HEAD = (
  'ForCausalLM', 'ForConditionalGeneration', 'LMHeadModel', 'ForMaskedLM',
  'ForPreTraining',
)  # fmt: skip
# Sections of config.json that may speak for the language model.
SECTIONS = ('text_config', 'language_config', 'llm_config')


def flag(config: Mapping[str, Any] | None) -> bool | None:
  """`tie_word_embeddings`, of the model or of its language model; or None."""
  config = config or {}
  if t5.head_is_told(config):
    return t5.has_tied_head(config)
  places = [config, *(config.get(section) for section in SECTIONS)]
  for place in places:
    if isinstance(place, Mapping) and 'tie_word_embeddings' in place:
      return place['tie_word_embeddings']
  return None


def untied(config: Mapping[str, Any] | None) -> dict[str, bool]:
  """Changes of a `config.json` that give the head an array of its own.

  Returns:
    `{name: False}`; dots lead into sections.
  """
  names = ['tie_word_embeddings']
  for section in SECTIONS:
    if isinstance((config or {}).get(section), Mapping):
      names.append(f'{section}.tie_word_embeddings')
  return dict.fromkeys(names, False)


def tied(
  specs: typing.SpecTree, config: Mapping[str, Any] | None
) -> dict[typing.Path, typing.Path]:
  """`{alias: path}` of names that are one array in the model.

  Args:
    specs: the stored parameters; an alias may be among them.
    config: its `config.json`: `tie_word_embeddings`, or, where that is silent,
      an architecture with a head that the checkpoint does not store.

  Example:
    >>> tied({'model.embed_tokens.weight': None}, {'tie_word_embeddings': True})
    {'lm_head.weight': 'model.embed_tokens.weight'}
  """
  says = flag(config)
  with_head = any(
    name.endswith(_WITH_HEAD)
    for name in (config or {}).get('architectures') or ()
  )
  found: dict[typing.Path, typing.Path] = {}
  for pair in _present(specs):
    missing = pair.alias not in specs
    if pair.always:
      # Whether a model has such a name at all is known where it is stored.
      holds = not missing
    else:
      holds = says is True or (says is None and with_head and missing)
    if holds:
      found[pair.alias] = pair.path
  return found


def possible(
  specs: typing.SpecTree, config: Mapping[str, Any] | None
) -> dict[typing.Path, typing.Path]:
  """`{alias: path}` of stored names that nothing says are arrays of their own.

  Where they repeat the other array, byte by byte, they are tied.
  """
  return {
    pair.alias: pair.path
    for pair in _present(specs)
    if pair.alias in specs and (pair.always or flag(config) is not False)
  }


def always(alias: typing.Path) -> bool:
  """Whether an alias is tied whatever the configuration says."""
  return any(pair.always for pair in known.TIES if pair.alias == alias)


def _present(specs):
  """Pairs of a model: one path an alias, and one head an embedding."""
  found: list[base.Pair] = []
  # What is stored is sure; of names that are not, the first is taken.
  for pair in sorted(known.TIES, key=lambda pair: pair.alias not in specs):
    there = pair.path in specs and (
      pair.alias in specs or pair.witness is None or pair.witness in specs
    )
    taken = any(
      pair.alias == other.alias
      or (pair.path == other.path and not (pair.always or other.always))
      for other in found
    )
    if there and not taken:
      found.append(pair)
  return found
