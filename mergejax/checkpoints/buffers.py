# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Arrays of PyTorch checkpoints that a model makes itself: buffers.

Rotary frequencies, position numbers, causal masks: they follow from the
configuration, are stored by some versions of a library and not by others, and
have no meaningful mean.
"""

import re

from mergejax.core import typing

_NAMES = re.compile(
  r'(.*\.)?(inv_freq|original_inv_freq|rope\.freqs|(cos|sin)_cached|'
  r'position_ids|token_type_ids|masked_bias|num_batches_tracked|'
  r'relative_position_index|attn_mask)'
)
# A parameter of this name is a vector; the mask is `[1, 1, length, length]`.
_MASKS = re.compile(r'(.*\.)?(attn|attention)\.(attention\.)?bias')


def is_buffer(path: typing.Path, spec: typing.LeafSpec) -> bool:
  """True for arrays that are no parameters of the model that stores them.

  Example:
    >>> mask = typing.LeafSpec((1, 1, 8, 8), np.dtype('bool'))
    >>> is_buffer('h.0.attn.bias', mask)
    True
    >>> is_buffer('h.0.attn.bias', typing.LeafSpec((8,), np.dtype('float32')))
    False
  """
  if _NAMES.fullmatch(path):
    return True
  square = len(spec.shape) == 4 and spec.shape[:2] == (1, 1)
  return square and _MASKS.fullmatch(path) is not None
