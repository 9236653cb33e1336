# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.experts import averages
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.experts import forest
from mergejax.experts import outer
from mergejax.experts.ensemble import Posterior
from mergejax.experts.forest import Forest
from mergejax.experts.mixture import Mixture

__all__ = [
  'Forest',
  'Mixture',
  'Posterior',
  'averages',
  'beginnings',
  'branch',
  'ensemble',
  'forest',
  'outer',
]
