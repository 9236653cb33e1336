# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every kind of adapter is made of, and what its tensors must look like."""

from collections.abc import Callable, Mapping
import math
import re
from typing import Any, NamedTuple

import numpy as np

from mergejax.core import errors


class Layer(NamedTuple):
  """What an adapter holds for one layer.

  Attributes:
    module: path of the layer in the model, or of a parameter that is adapted
      directly.
    parts: the layer's own tensors by name, float32.
    shared: tensors that all layers share, float32.
    config: `adapter_config.json`.
  """

  module: str
  parts: Mapping[str, np.ndarray]
  shared: Mapping[str, np.ndarray]
  config: Mapping[str, Any]

  def part(self, *names: str) -> np.ndarray:
    """The first of these tensors that the layer has."""
    return next(self.parts[name] for name in names if name in self.parts)

  def setting(self, key: str, pattern: str, default: float) -> float:
    """A setting, or its exception for this layer (`alpha_pattern`)."""
    value = self.config.get(key)
    for expression, exception in (self.config.get(pattern) or {}).items():
      if re.match(rf'(.*\.)?({expression})$', self.module):
        key, value = pattern, exception
        break
    if value is None:
      return float(default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise errors.CheckpointError(
        f'adapter_config.json has {value!r} as {key} of {self.module}, which is '
        'no number.'
      )
    return float(value)


class Kind(NamedTuple):
  """How one kind of adapter changes a layer.

  Kernels are seen as `[outputs, inputs, ...]` whatever way they are stored.

  Attributes:
    shapes: `{tensor: axes}`. `o` is the outputs of the kernel, `n` all its
      other axes together, `i` its input channels; other letters stand for the
      same size wherever a layer has them, and `*` for any. A tensor of more
      axes than letters is seen with its last ones joined; `|` gives a second
      form.
    needs: tensors of which a layer has all, one set or another.
    weight: `(kernel, layer) -> kernel`, float32.
    bias: `(bias, layer) -> bias`, where the bias changes too.
    shared: names of tensors that all layers share.
    refuse: `config -> reason`, None where the settings are understood.
  """

  shapes: Mapping[str, str]
  needs: tuple[frozenset[str], ...]
  weight: Callable[[np.ndarray, Layer], np.ndarray]
  bias: Callable[[np.ndarray, Layer], np.ndarray] | None = None
  shared: tuple[str, ...] = ()
  refuse: Callable[[Mapping[str, Any]], str | None] | None = None


def fits(
  kernel: tuple[int, ...],
  shapes: Mapping[str, str],
  given: Mapping[str, tuple[int, ...]],
) -> bool:
  """True if the tensors of a layer belong to a kernel of this shape.

  Args:
    kernel: `[outputs, inputs, ...]`.
    shapes: as in `Kind`.
    given: the shapes of the layer's tensors.

  Example:
    >>> fits((5, 3), {'a': 'r n', 'b': 'o r'}, {'a': (2, 3), 'b': (5, 2)})
    True
    >>> fits((5, 3), {'a': 'r n', 'b': 'o r'}, {'a': (2, 3), 'b': (3, 2)})
    False
  """
  sizes = {'o': kernel[0], 'n': math.prod(kernel[1:])}
  sizes['i'] = kernel[1] if len(kernel) > 1 else 1
  for part, shape in given.items():
    ways = (
      _agree(way.split(), shape, sizes) for way in shapes[part].split('|')
    )
    found = next((way for way in ways if way is not None), None)
    if found is None:
      return False
    sizes = found
  return True


def _agree(letters, shape, sizes):
  """The sizes of the letters with those of a tensor; None if they differ."""
  last = len(letters) - 1
  if len(shape) < len(letters):
    return None
  sizes = dict(sizes)
  joined = (*shape[:last], math.prod(shape[last:]))
  for letter, size in zip(letters, joined, strict=True):
    known = int(letter) if letter.isdigit() else sizes.get(letter, size)
    if letter != '*' and known != size:
      return None
    sizes[letter] = size
  return sizes
