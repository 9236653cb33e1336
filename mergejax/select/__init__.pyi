# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.select import b_tuning
from mergejax.select.bayes import evidence
from mergejax.select.bayes import from_moments
from mergejax.select.bayes import logme
from mergejax.select.features import extract
from mergejax.select.ranking import rank
from mergejax.select.transfer import h_score
from mergejax.select.transfer import leep
from mergejax.select.transfer import nce

__all__ = [
  'b_tuning',
  'evidence',
  'extract',
  'from_moments',
  'h_score',
  'leep',
  'logme',
  'nce',
  'rank',
]
