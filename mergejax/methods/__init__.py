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

_PUBLIC = {
  'Edit': ('mergejax.methods.arithmetic', 'Edit'),
  'FirstPass': ('mergejax.methods.base', 'FirstPass'),
  'LeafContext': ('mergejax.methods.base', 'LeafContext'),
  'METHODS': ('mergejax.methods.named', 'METHODS'),
  'Merge': ('mergejax.methods.base', 'Merge'),
  'MethodEntry': ('mergejax.methods.entries', 'MethodEntry'),
  'drop': ('mergejax.methods.edits', 'drop'),
  'drop_by_rank': ('mergejax.methods.edits', 'drop_by_rank'),
  'entry_of': ('mergejax.methods.named', 'entry_of'),
  'gathered': ('mergejax.methods.base', 'gathered'),
  'leafwise': ('mergejax.methods.base', 'leafwise'),
  'of_model': ('mergejax.methods.base', 'of_model'),
  'on_deltas': ('mergejax.methods.arithmetic', 'on_deltas'),
  'register': ('mergejax.methods.entries', 'register'),
  'rescaled': ('mergejax.methods.edits', 'rescaled'),
  'resolve': ('mergejax.methods.named', 'resolve'),
  'trim': ('mergejax.methods.edits', 'trim'),
  'trim_both_ends': ('mergejax.methods.edits', 'trim_both_ends'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
