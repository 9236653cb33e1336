# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Meshes, and the rules that lay arrays out on them.

What goes where is an argument: `ShardingRules` map the names of logical axes,
which a model family gives, to axes of the mesh.
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
