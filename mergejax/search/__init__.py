# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which coefficients: soups, patches (PAINT), grids, evolution, gradients.

space = mj.search.Space('task_arithmetic', 2, vary='scale')
with mj.search.Log('candidates.jsonl', {'space': space}) as log:
  mj.search.evolve.evolve(space, evaluate, budget=40, log=log)
best = log.best().point
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
