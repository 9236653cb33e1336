# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints, told from those whose arrays are the weights.

A quantised weight is a function of several arrays: codes, scales, zeros. An
average of each is not the average of the weights, so such a checkpoint can be
looked at but not merged.
"""

from collections.abc import Iterator, Mapping
import re
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.core import errors
from mergejax.core import typing

_LOAD = 'AutoModelForCausalLM.from_pretrained({path!r}'
_SAVE = '.save_pretrained(NEW)'
# By the name that a configuration gives the scheme: how to get plain weights.
_REMEDIES = {
  'bitsandbytes': f'{_LOAD}).dequantize(){_SAVE}',
  'fp8': f'{_LOAD}, quantization_config=FineGrainedFP8Config('
  f'dequantize=True)){_SAVE}',
  'mxfp4': f'{_LOAD}, quantization_config=Mxfp4Config(dequantize=True)){_SAVE}',
  'compressed-tensors': f'{_LOAD}, quantization_config='
  f'CompressedTensorsConfig(dequantize=True)){_SAVE}',
}
# Signs by the last part of a packed array's name; the first that fits counts.
# Where two expressions are given, a sibling must match the second one.
_SIGNS = (
  ('gptq', 'qweight', 'g_idx'),
  ('awq', 'qweight', 'qzeros'),
  ('packed', 'qweight', None),
  ('hqq', 'W_q', None),
  ('bitsandbytes', r'bitsandbytes__\w+', None),
  ('bitsandbytes', 'weight', 'SCB'),
  ('mxfp4', r'\w*_blocks', r'\w*_scales'),
  ('compressed-tensors', 'weight_packed', None),
  ('aqlm', 'codes', 'codebooks'),
  ('quip', 'Qidxs', None),
  ('vptq', 'indices', r'.*centroids'),
  ('spqr', 'dense_weights', None),
  ('quanto', '_data|_packed', None),
  ('torchao', r'_?(weight_)?qdata', None),
  ('qwix', 'qvalue', None),
)
# Siblings of 8-bit arrays that tell how to read them.
_SCALE = re.compile(r'(\w+_)?(scale|scales|scale_inv|zero_?point)|SCB|absmax')
_OWN_SCALE = re.compile(
  r'((input|weight|kernel|output|activation)_)?scale(_inv)?'
)


def scheme(
  specs: typing.SpecTree, config: Mapping[str, Any] | None = None
) -> str | None:
  """How a checkpoint is quantised, or None if its arrays are its weights.

  The arrays decide: a configuration that speaks of quantisation beside plain
  floating weights (of a model that was dequantised and saved) is not believed.

  Args:
    specs: the stored parameters.
    config: `config.json`; its `quantization_config` names the scheme.

  Returns:
    The name that the configuration gives, or else that of the scheme which has
    arrays of these names; `'packed'` for integers of an unknown scheme.

  Example:
    >>> code, scale = np.dtype(np.int8), np.dtype(np.float32)
    >>> scheme({
    ...   'wi.weight': typing.LeafSpec((4, 4), code),
    ...   'wi.SCB': typing.LeafSpec((4,), scale),
    ... })
    'bitsandbytes'
  """
  modules: dict[str, typing.SpecTree] = {}
  for path, spec in specs.items():
    module, last = _split(path)
    modules.setdefault(module, {})[last] = spec
  named = next(declared(config), None)
  signs = []
  for own in modules.values():
    for last, spec in own.items():
      sign = _sign(last, spec, own)
      if sign is None and named and _is_packed(spec.dtype):
        # Unknown names; a table of positions has one row at most.
        sign = 'packed' if sum(n > 1 for n in spec.shape) > 1 else None
      if sign is not None:
        signs.append(sign)
  if not signs:
    return None
  return named or next((sign for sign in signs if sign != 'packed'), 'packed')


def declared(config: Mapping[str, Any] | None) -> Iterator[str]:
  """Schemes that a configuration, or a part of it, says weights are stored in."""
  for key, value in (config or {}).items():
    if not isinstance(value, Mapping):
      continue
    if key in ('quantization_config', 'compression_config'):
      yield str(value.get('quant_method') or 'packed')
    else:
      yield from declared(value)


def check(store: base.ParamStore) -> None:
  """Refuses to merge, compare or train on a quantised checkpoint.

  Raises:
    UserError: its arrays are codes and scales; the message says of which
      scheme and how to get weights from them.
  """
  found = store.quantised or scheme(store.specs())
  if found is None:
    return
  remedy = _REMEDIES.get(found)
  if remedy is None:
    advice = (
      'Take the unquantised models that these were made from, and quantise the '
      'result.'
    )
  else:
    line = remedy.format(path=store.name)
    advice = (
      'Dequantise it first, with transformers:\n'
      f'  {line}\n'
      'or take the unquantised model that it was made from.'
    )
  raise errors.CheckpointError(
    f'{store.name} is quantised ({found}): its arrays are codes and scales, '
    f'and an average of codes is not an average of weights. {advice}'
  )


def _split(path):
  """A path as the module and the last part of the name."""
  *module, last = re.split('[./:]', path)
  return '.'.join(module), last


def _sign(last, spec, siblings):
  """The scheme that an array belongs to, judged beside its siblings."""
  if spec.dtype.name == 'float8_e8m0fnu':
    return 'mx'  # powers of two without a sign: they are scales of blocks
  if not _is_packed(spec.dtype):
    return None
  for name, own, beside in _SIGNS:
    if re.fullmatch(own, last) and (
      beside is None or any(re.fullmatch(beside, one) for one in siblings)
    ):
      return name
  if spec.dtype.name.startswith('float8_'):
    # Weights that were only cast to 8 bits have no scales, or 8-bit ones.
    scaled = any(
      (_OWN_SCALE.fullmatch(one) or (last in one and 'scale' in one))
      and not other.dtype.name.startswith('float8_')
      for one, other in siblings.items()
    )
    return 'fp8' if scaled else None
  if last in ('weight', 'kernel', 'embedding'):
    return 'packed'
  scaled = any(_SCALE.fullmatch(one) for one in siblings)
  return 'packed' if scaled and spec.dtype.itemsize == 1 else None


def _is_packed(dtype: np.dtype) -> bool:
  """True for integers of any width, and for floats of a byte or less."""
  return dtype.name.startswith(('int', 'uint', 'float4_', 'float6_', 'float8_'))
