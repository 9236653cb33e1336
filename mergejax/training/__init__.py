# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training as a library; `Trainer` is the way in."""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
