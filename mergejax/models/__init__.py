# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: families of architectures, and modules from checkpoints and back.

Each name loads where it is first used: merging other libraries' models needs
no linen.
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
