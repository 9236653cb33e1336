# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.experts import branch
from mergejax.experts import ensemble

__all__ = [
  'branch',
  'ensemble',
]
