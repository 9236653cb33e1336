# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.search import evolve
from mergejax.search import gradient
from mergejax.search import greedy
from mergejax.search import grid
from mergejax.search import patch
from mergejax.search.base import Candidate
from mergejax.search.base import Log
from mergejax.search.base import Space
from mergejax.search.base import blocks_of
from mergejax.search.base import learned_space
from mergejax.search.base import mean_score

__all__ = [
  'Candidate',
  'Log',
  'Space',
  'blocks_of',
  'evolve',
  'gradient',
  'greedy',
  'grid',
  'learned_space',
  'mean_score',
  'patch',
]
