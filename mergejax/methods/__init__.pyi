# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.methods.arithmetic import Edit
from mergejax.methods.arithmetic import on_deltas
from mergejax.methods.base import FirstPass
from mergejax.methods.base import LeafContext
from mergejax.methods.base import Merge
from mergejax.methods.base import gathered
from mergejax.methods.base import leafwise
from mergejax.methods.base import of_model
from mergejax.methods.edits import drop
from mergejax.methods.edits import drop_by_rank
from mergejax.methods.edits import rescaled
from mergejax.methods.edits import trim
from mergejax.methods.edits import trim_both_ends
from mergejax.methods.entries import MethodEntry
from mergejax.methods.entries import register
from mergejax.methods.named import METHODS
from mergejax.methods.named import entry_of
from mergejax.methods.named import resolve

__all__ = [
  'Edit',
  'FirstPass',
  'LeafContext',
  'METHODS',
  'Merge',
  'MethodEntry',
  'drop',
  'drop_by_rank',
  'entry_of',
  'gathered',
  'leafwise',
  'of_model',
  'on_deltas',
  'register',
  'rescaled',
  'resolve',
  'trim',
  'trim_both_ends',
]
