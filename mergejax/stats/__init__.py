# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics that merges look at: Gram matrices, Fisher information, survey.

statistics = mj.stats.collect(mj.stats.gram(), module, params, batches)
merged = mj.merge([a, b], 'regmean', stats=[statistics_of_a, statistics_of_b])
"""

from mergejax.stats.base import Statistic
from mergejax.stats.base import collect
from mergejax.stats.fishers import fisher
from mergejax.stats.grams import gram
from mergejax.stats.saved import Statistics
from mergejax.stats.saved import combine
from mergejax.stats.saved import fingerprint
from mergejax.stats.saved import load
from mergejax.stats.surveys import survey

__all__ = [
  'Statistic', 'Statistics', 'collect', 'combine', 'fingerprint', 'fisher',
  'gram', 'load', 'survey',
]  # fmt: skip
