# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How models lie to each other: loss barriers, planes, batch norms anew."""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
