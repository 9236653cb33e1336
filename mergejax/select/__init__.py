# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which model for which task: LogME, LEEP, NCE, H-score, B-Tuning."""

from mergejax.core import lazy

_PUBLIC = {
  'b_tuning': ('mergejax.select.b_tuning', None),
  'evidence': ('mergejax.select.bayes', 'evidence'),
  'extract': ('mergejax.select.features', 'extract'),
  'from_moments': ('mergejax.select.bayes', 'from_moments'),
  'h_score': ('mergejax.select.transfer', 'h_score'),
  'leep': ('mergejax.select.transfer', 'leep'),
  'logme': ('mergejax.select.bayes', 'logme'),
  'nce': ('mergejax.select.transfer', 'nce'),
  'rank': ('mergejax.select.ranking', 'rank'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
