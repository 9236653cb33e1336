# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tensors of an adapter's file are, by their names."""

from collections.abc import Iterable, Sequence
import re
from typing import NamedTuple

from mergejax.checkpoints.peft import base
from mergejax.core import typing

_PREFIX = re.compile(r'base_model\.(model\.)?')
_TOKENS = re.compile(
  r'(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?'
)
_WRAPPERS = re.compile(
  r'\.(modules_to_save|ln_tuning_layers)(\.default)?(?=\.)'
)


# What training alone needs.
_UNUSED = re.compile(
  r'.*\.(original_module|lora_velora\w*|lora_monteclora\w*)\b.*'
)


class Names(NamedTuple):
  """The tensors of an adapter, as paths of its file.

  Attributes:
    layers: `{(module, depth): {tensor: path}}`; parameters of one module that
      are adapted directly lie at different depths.
    saved: `{parameter: path}` of parameters that were trained whole.
    tokens: `{module: path}` of embedding rows that were trained.
    shared: `{tensor: path}` that all layers share.
  """

  layers: dict[tuple[str, int], dict[str, typing.Path]]
  saved: dict[typing.Path, typing.Path]
  tokens: dict[str, typing.Path]
  shared: dict[str, typing.Path]


def read(paths: Iterable[typing.Path], kind: base.Kind) -> Names:
  """Sorts the paths of an adapter's file.

  Example:
    >>> from mergejax.checkpoints.peft import kinds
    >>> read(['base_model.model.q.lora_A.weight'], kinds.KINDS['LORA']).layers
    {('q', 0): {'lora_A': 'base_model.model.q.lora_A.weight'}}
  """
  names = Names({}, {}, {}, {})
  parts = '|'.join(map(re.escape, kind.shapes)) or '(?!)'
  layer = re.compile(
    rf'(?P<module>.+)\.(?P<part>{parts})(\.default)?(\.weight)?(?P<bias>\.bias)?'
  )
  for path in paths:
    plain = _PREFIX.sub('', path, count=1) if _PREFIX.match(path) else path
    plain, depth = re.subn(r'(^|(?<=\.))base_layer\.', '', plain)
    if plain.removesuffix('.default') in kind.shared:
      names.shared[plain.removesuffix('.default')] = path
    elif _UNUSED.fullmatch(plain):
      continue
    elif match := _TOKENS.fullmatch(plain):
      names.tokens[match['module']] = path
    elif match := layer.fullmatch(plain):
      part = match['part'] + (match['bias'] or '')
      names.layers.setdefault((match['module'], depth), {})[part] = path
    else:
      names.saved[_WRAPPERS.sub('', plain)] = path
  return names


def is_within(path: str, modules: Sequence[str]) -> bool:
  """True if a parameter lies in one of the modules, named as PEFT names them.

  Example:
    >>> is_within('bert.classifier.dense.weight', ['classifier'])
    True
  """
  return any(f'.{module}.' in f'.{path}' for module in modules)
