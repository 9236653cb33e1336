# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.core.statistic_specs import StatisticSpec
from mergejax.statistics.base import Statistic
from mergejax.statistics.base import collect
from mergejax.statistics.fishers import fisher
from mergejax.statistics.grams import gram
from mergejax.statistics.saved import Statistics
from mergejax.statistics.saved import combine
from mergejax.statistics.saved import fingerprint
from mergejax.statistics.saved import load
from mergejax.statistics.surveys import survey

__all__ = [
  'Statistic',
  'StatisticSpec',
  'Statistics',
  'collect',
  'combine',
  'fingerprint',
  'fisher',
  'gram',
  'load',
  'survey',
]
