# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which coefficients: soups, patches (PAINT), grids, evolution, gradients.

space = mj.search.Space('task_arithmetic', 2, vary='scale')
with mj.search.Log('candidates.jsonl', {'space': space}) as log:
  mj.search.evolve.evolve(space, evaluate, budget=40, log=log)
best = log.best().point
"""

from mergejax.core import lazy

_PUBLIC = {
  'Candidate': ('mergejax.search.base', 'Candidate'),
  'Log': ('mergejax.search.base', 'Log'),
  'Space': ('mergejax.search.base', 'Space'),
  'blocks_of': ('mergejax.search.base', 'blocks_of'),
  'evolve': ('mergejax.search.evolve', None),
  'gradient': ('mergejax.search.gradient', None),
  'greedy': ('mergejax.search.greedy', None),
  'grid': ('mergejax.search.grid', None),
  'learned_space': ('mergejax.search.base', 'learned_space'),
  'mean_score': ('mergejax.search.base', 'mean_score'),
  'patch': ('mergejax.search.patch', None),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
