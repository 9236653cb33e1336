# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""mergejax: train experts and merge models in JAX.

`import mergejax as mj` is light: every name of `__init__.pyi` loads where it
is first used, and none of TensorFlow, seqio or gin loads before it is needed.
"""

from mergejax.core import lazy

__version__ = '0.1.0'

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
__all__ += ['__version__']
