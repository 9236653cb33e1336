# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.experts.ensemble import Posterior
from mergejax.experts.mixture import Mixture

__all__ = [
  'Mixture',
  'Posterior',
  'branch',
  'ensemble',
]
