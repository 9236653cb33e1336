# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How models lie to each other: loss barriers, planes, batch norms anew."""

from mergejax.core import lazy

_PUBLIC = {
  'Line': ('mergejax.analysis.barrier', 'Line'),
  'Plane': ('mergejax.analysis.barrier', 'Plane'),
  'barrier': ('mergejax.analysis.barrier', None),
  'line': ('mergejax.analysis.barrier', 'line'),
  'norms': ('mergejax.analysis.norms', None),
  'plane': ('mergejax.analysis.barrier', 'plane'),
  'refresh_norms': ('mergejax.analysis.norms', 'refresh_norms'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
