# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The nouns everything else is written in."""

import dataclasses
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
# A nested dict of arrays, or any pytree of them.
Tree = Any
# '/'-joined keys from the root to a leaf: 'encoder/layers_0/mlp/wi/kernel'.
Path = str


@dataclasses.dataclass(frozen=True)
class LeafSpec:
  """What is known of an array without reading it.

  Attributes:
    shape: sizes of its axes.
    dtype: NumPy dtype (bfloat16 included, through ml_dtypes).
    axes: logical name of every axis (`('embed', 'mlp')`), or None if unknown.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  axes: tuple[str, ...] | None = None

  @property
  def size(self) -> int:
    """Number of elements."""
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def nbytes(self) -> int:
    """Bytes of the stored array."""
    return self.size * self.dtype.itemsize


# Specs by path, in the order of the source.
SpecTree = dict[Path, LeafSpec]
