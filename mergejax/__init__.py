# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""mergejax: train experts and merge models in JAX.

`import mergejax as mj` is light: every name below loads where it is first
used, and none of TensorFlow, seqio or gin loads before it is needed.
"""

import importlib

__version__ = '0.1.0'

# public name -> (module, attribute or None for the module itself)
_PUBLIC = {
  'UserError': ('mergejax.errors', 'UserError'),
  'Merge': ('mergejax.merging.base', 'Merge'),
  'analogy': ('mergejax.merging.arithmetic', 'analogy'),
  'evaluation': ('mergejax.evaluation', None),
  'experts': ('mergejax.experts', None),
  'interpolate': ('mergejax.merging.mean', 'interpolate'),
  'linear': ('mergejax.merging.mean', 'linear'),
  'load_model': ('mergejax.models', 'load_model'),
  'load_recipe': ('mergejax.recipe', 'load_recipe'),
  'make_mesh': ('mergejax.mesh', 'make_mesh'),
  'merge': ('mergejax.api', 'merge'),
  'negate': ('mergejax.merging.arithmetic', 'negate'),
  'open_checkpoint': ('mergejax.store.checkpoint', 'open_checkpoint'),
  'save_checkpoint': ('mergejax.store.checkpoint', 'save_checkpoint'),
  'task_arithmetic': ('mergejax.merging.arithmetic', 'task_arithmetic'),
}

__all__ = sorted(_PUBLIC) + ['__version__']


def __getattr__(name):
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _PUBLIC[name]
  loaded = importlib.import_module(module)
  value = loaded if attribute is None else getattr(loaded, attribute)
  globals()[name] = value
  return value


def __dir__():
  return __all__
