# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Linear layers that store their kernel as `[inputs, outputs]`.

GPT-2 and its descendants in transformers call them Conv1D. PEFT sees the class;
here the names and the shapes of the checkpoint tell: a kernel that makes
queries, keys and values of its inputs is three times as wide as it is high.
"""

from mergejax.core import typing
from mergejax.names import known


def find(specs: typing.SpecTree) -> bool | None:
  """True if the model stores kernels so, False if not, None if nothing tells.

  Example:
    >>> import numpy as np
    >>> spec = typing.LeafSpec((8, 24), np.dtype('float32'))
    >>> find({'h.0.attn.c_attn.weight': spec})
    True
  """
  for path, spec in specs.items():
    if path.endswith('c_attn.weight') and len(spec.shape) == 2:
      inputs, outputs = spec.shape
      if outputs == 3 * inputs:
        return True
      if inputs == 3 * outputs:
        return False
  return None


def is_one(module: str) -> bool:
  """True for the names that such layers have, where a model has them at all."""
  return known.TRANSPOSED.fullmatch(module) is not None
