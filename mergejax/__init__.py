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
  'Merge': ('mergejax.methods.base', 'Merge'),
  'UserError': ('mergejax.core.errors', 'UserError'),
  'align': ('mergejax.align', None),
  'analogy': ('mergejax.methods.arithmetic', 'analogy'),
  'arcee_fusion': ('mergejax.methods.swap', 'arcee_fusion'),
  'breadcrumbs': ('mergejax.methods.ties', 'breadcrumbs'),
  'breadcrumbs_ties': ('mergejax.methods.ties', 'breadcrumbs_ties'),
  'dare_linear': ('mergejax.methods.ties', 'dare_linear'),
  'dare_ties': ('mergejax.methods.ties', 'dare_ties'),
  'della': ('mergejax.methods.ties', 'della'),
  'della_linear': ('mergejax.methods.ties', 'della_linear'),
  'evaluation': ('mergejax.evaluation', None),
  'execute': ('mergejax.merging.disk.executor', 'execute'),
  'experts': ('mergejax.experts', None),
  'fisher': ('mergejax.methods.fisher', 'fisher'),
  'interpolate': ('mergejax.methods.mean', 'interpolate'),
  'karcher': ('mergejax.methods.sphere', 'karcher'),
  'linear': ('mergejax.methods.mean', 'linear'),
  'load_model': ('mergejax.models', 'load_model'),
  'load_recipe': ('mergejax.merging.recipes.recipe', 'load_recipe'),
  'make_mesh': ('mergejax.partition', 'make_mesh'),
  'merge': ('mergejax.merging.api', 'merge'),
  'model_stock': ('mergejax.methods.sphere', 'model_stock'),
  'multislerp': ('mergejax.methods.sphere', 'multislerp'),
  'nearswap': ('mergejax.methods.swap', 'nearswap'),
  'negate': ('mergejax.methods.arithmetic', 'negate'),
  'nuslerp': ('mergejax.methods.sphere', 'nuslerp'),
  'open_checkpoint': ('mergejax.checkpoints.checkpoint', 'open_checkpoint'),
  'passthrough': ('mergejax.methods.mean', 'passthrough'),
  'plan': ('mergejax.merging.disk.planner', 'plan'),
  'ram': ('mergejax.methods.ram', 'ram'),
  'ram_plus': ('mergejax.methods.ram', 'ram_plus'),
  'regmean': ('mergejax.methods.regmean', 'regmean'),
  'save_checkpoint': ('mergejax.checkpoints.checkpoint', 'save_checkpoint'),
  'sce': ('mergejax.methods.select_erase', 'sce'),
  'select': ('mergejax.select', None),
  'slerp': ('mergejax.methods.sphere', 'slerp'),
  'stats': ('mergejax.statistics', None),
  'task_arithmetic': ('mergejax.methods.arithmetic', 'task_arithmetic'),
  'ties': ('mergejax.methods.ties', 'ties'),
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
