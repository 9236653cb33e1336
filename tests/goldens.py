# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the golden vectors, made by the original authors' code."""

import pathlib

import numpy as np

from mergejax.core import tree

FOLDER = pathlib.Path(__file__).parent / 'testdata'


def load(name: str) -> dict[str, np.ndarray]:
  """All arrays of `testdata/NAME.npz`."""
  with np.load(FOLDER / f'{name}.npz') as archive:
    return dict(archive)


def subtree(arrays, prefix: str):
  """Nested dicts of the arrays below `prefix`."""
  return tree.unflatten(
    {
      name.removeprefix(prefix): array
      for name, array in arrays.items()
      if name.startswith(prefix)
    }
  )
