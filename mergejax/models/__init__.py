# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: families of architectures, and modules from checkpoints and back.

Each name loads where it is first used: merging other libraries' models needs
no linen.
"""

from mergejax.core import lazy

_PUBLIC = {
  'Classifier': ('mergejax.models.classifier', 'Classifier'),
  'Conversion': ('mergejax.models.base', 'Conversion'),
  'ModelFamily': ('mergejax.models.base', 'ModelFamily'),
  'Outputs': ('mergejax.models.base', 'Outputs'),
  'axes': ('mergejax.models.loading', 'axes'),
  'build': ('mergejax.models.registry', 'build'),
  'conversion': ('mergejax.models.registry', 'conversion'),
  'describe': ('mergejax.models.registry', 'describe'),
  'family_class': ('mergejax.models.registry', 'family_class'),
  'family_for': ('mergejax.models.registry', 'family_for'),
  'family_of': ('mergejax.models.registry', 'family_of'),
  'is_converted': ('mergejax.models.loading', 'is_converted'),
  'load_model': ('mergejax.models.loading', 'load_model'),
  'load_module': ('mergejax.models.loading', 'load_module'),
  'names': ('mergejax.models.registry', 'names'),
  'register': ('mergejax.models.registry', 'register'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
