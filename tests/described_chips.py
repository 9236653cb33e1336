# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Devices of several slices, as far as a mesh looks at them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
  """As much of a described device as a mesh looks at."""

  id: int
  slice_index: int
  platform: str = 'described'
  device_kind: str = 'described'
  process_index: int = 0
  coords: tuple[int, ...] = ()
  core_on_chip: int = 0


# Four slices of four.
CHIPS = [Chip(i, i // 4) for i in range(16)]


def torus(*sides):
  """A slice of v5p of three sides."""
  return [
    Chip(i, 0, 'tpu', 'TPU v5', coords=tuple(map(int, place)))
    for i, place in enumerate(np.ndindex(*sides))
  ]
