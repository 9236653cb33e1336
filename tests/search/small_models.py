# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models of a few numbers, for tests of searches."""

import numpy as np


def make_models(count=3, seed=0):
  rng = np.random.default_rng(seed)
  tree = lambda: {
    'layers_0': {'w': rng.normal(size=(4, 3)).astype(np.float32)},
    'layers_1': {'w': rng.normal(size=(4, 3)).astype(np.float32)},
    'norm': rng.normal(size=3).astype(np.float32),
  }
  return [tree() for _ in range(count)]
