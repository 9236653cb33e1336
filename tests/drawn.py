# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters for tests that do not ask how a model begins."""

import numpy as np

from mergejax.core import tree


def params(family, seed=0, size=0.4):
  """Normal numbers, scales around 1; drawn by NumPy, so nothing compiles."""
  rng = np.random.default_rng(seed)
  draw = lambda spec: rng.normal(0, size, spec.shape).astype(np.float32)
  leaves = {
    path: draw(spec) + np.float32(path.endswith('scale'))
    for path, spec in family.specs().items()
  }
  return tree.unflatten(leaves)
