# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which model for which task: LogME, LEEP, NCE, H-score, B-Tuning."""

from mergejax.select.bayes import evidence
from mergejax.select.bayes import logme
from mergejax.select.features import extract
from mergejax.select.transfer import h_score
from mergejax.select.transfer import leep
from mergejax.select.transfer import nce

__all__ = ['evidence', 'extract', 'h_score', 'leep', 'logme', 'nce']
