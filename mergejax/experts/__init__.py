# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""K experts side by side on the mesh axis `branch`, and their ensembles."""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
