# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.analysis import barrier
from mergejax.analysis import norms
from mergejax.analysis.barrier import Line
from mergejax.analysis.barrier import Plane
from mergejax.analysis.barrier import line
from mergejax.analysis.barrier import plane
from mergejax.analysis.norms import refresh_norms

__all__ = [
  'Line',
  'Plane',
  'barrier',
  'line',
  'norms',
  'plane',
  'refresh_norms',
]
