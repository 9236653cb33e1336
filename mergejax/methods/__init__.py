# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge method is, and the words from which one is composed.

The methods themselves stand at the front door (`mj.ties`); this is for those
who write one:

@mj.methods.register('half', base='required')
def half() -> mj.Merge:
  return mj.methods.on_deltas(mj.linear(), mj.methods.trim(0.5))
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
