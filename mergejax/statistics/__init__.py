# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics that merges look at: Gram matrices, Fisher information, survey.

statistics = mj.stats.collect(mj.stats.gram(), module, params, batches)
merged = mj.merge([a, b], 'regmean', stats=[statistics_of_a, statistics_of_b])
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
