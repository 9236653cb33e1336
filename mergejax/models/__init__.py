# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: families of architectures, and modules from checkpoints and back.

Each name loads where it is first used: merging other libraries' models needs
no linen.
"""

import importlib

# public name -> module of this package
_PUBLIC = {
  'Classifier': 'classifier',
  'Conversion': 'base',
  'ModelFamily': 'base',
  'Outputs': 'base',
  'axes': 'loading',
  'build': 'registry',
  'conversion': 'registry',
  'describe': 'registry',
  'family_class': 'registry',
  'family_for': 'registry',
  'family_of': 'registry',
  'is_converted': 'loading',
  'load_model': 'loading',
  'load_module': 'loading',
  'names': 'registry',
  'register': 'registry',
  # What training and evaluation still call.
  'BATCH_STATS': 'legacy',
  'check_batch': 'legacy',
  'given_weights': 'legacy',
  'init_params': 'legacy',
  'logits': 'legacy',
  'param_specs': 'legacy',
  'target_weights': 'legacy',
  'targets': 'legacy',
  'training_logits': 'legacy',
}

__all__ = sorted(_PUBLIC)


def __getattr__(name):
  if name not in _PUBLIC:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_PUBLIC[name]}')
  value = getattr(module, name)
  globals()[name] = value
  return value


def __dir__():
  return __all__
