# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts side by side, their ensembles, and models that route between them."""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
