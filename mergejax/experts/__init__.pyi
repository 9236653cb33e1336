# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.experts import averages
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import clusters
from mergejax.experts import ensemble
from mergejax.experts import forest
from mergejax.experts import outer
from mergejax.experts import to_dense
from mergejax.experts import upcycle
from mergejax.experts import usage
from mergejax.experts.adapter_route import AdapterRouter
from mergejax.experts.ensemble import Posterior
from mergejax.experts.forest import Forest
from mergejax.experts.mixture import Mixture
from mergejax.experts.route import Router

__all__ = [
  'AdapterRouter',
  'Forest',
  'Mixture',
  'Posterior',
  'Router',
  'averages',
  'beginnings',
  'branch',
  'clusters',
  'ensemble',
  'forest',
  'outer',
  'to_dense',
  'upcycle',
  'usage',
]
