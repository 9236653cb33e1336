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
  'Merge': ('mergejax.merging.base', 'Merge'),
  'UserError': ('mergejax.errors', 'UserError'),
  'align': ('mergejax.align', None),
  'analogy': ('mergejax.merging.arithmetic', 'analogy'),
  'arcee_fusion': ('mergejax.merging.swap', 'arcee_fusion'),
  'breadcrumbs': ('mergejax.merging.ties', 'breadcrumbs'),
  'breadcrumbs_ties': ('mergejax.merging.ties', 'breadcrumbs_ties'),
  'dare_linear': ('mergejax.merging.ties', 'dare_linear'),
  'dare_ties': ('mergejax.merging.ties', 'dare_ties'),
  'della': ('mergejax.merging.ties', 'della'),
  'della_linear': ('mergejax.merging.ties', 'della_linear'),
  'evaluation': ('mergejax.evaluation', None),
  'execute': ('mergejax.streamed.executor', 'execute'),
  'experts': ('mergejax.experts', None),
  'fisher': ('mergejax.merging.fisher', 'fisher'),
  'interpolate': ('mergejax.merging.mean', 'interpolate'),
  'karcher': ('mergejax.merging.sphere', 'karcher'),
  'linear': ('mergejax.merging.mean', 'linear'),
  'load_model': ('mergejax.models', 'load_model'),
  'load_recipe': ('mergejax.recipes.recipe', 'load_recipe'),
  'make_mesh': ('mergejax.mesh', 'make_mesh'),
  'merge': ('mergejax.api', 'merge'),
  'model_stock': ('mergejax.merging.sphere', 'model_stock'),
  'multislerp': ('mergejax.merging.sphere', 'multislerp'),
  'nearswap': ('mergejax.merging.swap', 'nearswap'),
  'negate': ('mergejax.merging.arithmetic', 'negate'),
  'nuslerp': ('mergejax.merging.sphere', 'nuslerp'),
  'open_checkpoint': ('mergejax.store.checkpoint', 'open_checkpoint'),
  'passthrough': ('mergejax.merging.mean', 'passthrough'),
  'plan': ('mergejax.streamed.planner', 'plan'),
  'ram': ('mergejax.merging.ram', 'ram'),
  'ram_plus': ('mergejax.merging.ram', 'ram_plus'),
  'regmean': ('mergejax.merging.regmean', 'regmean'),
  'save_checkpoint': ('mergejax.store.checkpoint', 'save_checkpoint'),
  'sce': ('mergejax.merging.select_erase', 'sce'),
  'select': ('mergejax.select', None),
  'slerp': ('mergejax.merging.sphere', 'slerp'),
  'stats': ('mergejax.stats', None),
  'task_arithmetic': ('mergejax.merging.arithmetic', 'task_arithmetic'),
  'ties': ('mergejax.merging.ties', 'ties'),
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
