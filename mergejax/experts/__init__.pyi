# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.experts import to_dense
from mergejax.experts import upcycle
from mergejax.experts import usage

__all__ = [
  'branch',
  'ensemble',
  'to_dense',
  'upcycle',
  'usage',
]
