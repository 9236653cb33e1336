# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Modules of a model: stacks of layers, towers, encoder and decoder.

The names are mergekit's, by which recipes treat modules apart.
"""

from collections.abc import Callable, Iterable
import re

from mergejax.core import typing
from mergejax.names import known

# Parts of models that join several; first match wins.
TOWERS = (
  ('multi_modal_projector', re.compile(
    r'(.*[./])?(multi_modal_projector|mm_projector|connector|'
    r'visual[./](merger|deepstack_merger)\w*)[./].*')),
  ('vision_tower', re.compile(
    r'(.*[./])?(vision_tower|vision_model|vision_encoder|visual)[./].*')),
  ('audio_tower', re.compile(r'(.*[./])?(audio_tower|audio_model)[./].*')),
)  # fmt: skip
TEXT, REST, WHOLE = 'text_decoder', 'shared', 'default'
ALIASES = {
  'vision_model': 'vision_tower',
  'vision_encoder': 'vision_tower',
  'visual': 'vision_tower',
  'language_model': TEXT,
  'text_model': TEXT,
}


def layer_counts(paths: Iterable[typing.Path]) -> dict[str, int]:
  """`{stem: number of layers}` of every stack.

  Example:
    >>> layer_counts(['a.layers.0.w', 'a.layers.1.w', 'norm'])
    {'a.layers.': 2}
  """
  counts: dict[str, int] = {}
  for path in paths:
    match = known.LAYER.fullmatch(path)
    if match:
      stem = match['stem']
      counts[stem] = max(counts.get(stem, 0), int(match['index']) + 1)
  return counts


def module_names(
  paths: Iterable[typing.Path],
) -> Callable[[typing.Path], str]:
  """A function that tells the module of a parameter, as mergekit calls it.

  Args:
    paths: the parameters of a model.

  Returns:
    `path -> 'text_decoder'`, `'vision_tower'`, `'multi_modal_projector'` or
    `'audio_tower'` for models that join several; `'encoder'`, `'decoder'` or
    `'shared'` for those; `'default'` otherwise.
  """
  paths = list(paths)
  if any(tower(path) for path in paths):
    return lambda path: tower(path) or TEXT
  sides = {side(stem) for stem in layer_counts(paths)}
  if {'encoder', 'decoder'} <= sides:
    return lambda path: side(path) or REST
  return lambda path: WHOLE


def tower(path: typing.Path) -> str | None:
  """The module of a parameter apart from the text decoder, or None."""
  return next((n for n, own in TOWERS if own.fullmatch(path)), None)


def side(path: typing.Path) -> str | None:
  """`'encoder'` or `'decoder'`, whichever a path names first, or None."""
  parts = re.split('[./]', path)
  return next((part for part in parts if part in ('encoder', 'decoder')), None)
