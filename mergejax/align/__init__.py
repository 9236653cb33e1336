# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Git Re-Basin: permuting the units of one model to match those of another.

spec = mj.align.derive(apply, a, batch)
permutation = mj.align.match_weights(spec, a, b)
merged = mj.merge([a, mj.align.permute(spec, permutation, b)], 'linear')
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
