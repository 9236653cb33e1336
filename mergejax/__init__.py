# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""mergejax: train experts and merge models in JAX.

`import mergejax as mj` is light: every name below loads where it is first
used, and none of TensorFlow, seqio or gin loads before it is needed. What an
editor reads of them stands in `__init__.pyi`.
"""

from mergejax.core import lazy

__version__ = '0.1.0'

# public name -> (module, attribute or None for the module itself)
_PUBLIC = {
  'CheckpointError': ('mergejax.core.errors', 'CheckpointError'),
  'ConfigError': ('mergejax.core.errors', 'ConfigError'),
  'DataError': ('mergejax.core.errors', 'DataError'),
  'Merge': ('mergejax.methods.base', 'Merge'),
  'RecipeError': ('mergejax.core.errors', 'RecipeError'),
  'Stopped': ('mergejax.core.errors', 'Stopped'),
  'StructureError': ('mergejax.core.errors', 'StructureError'),
  'UserError': ('mergejax.core.errors', 'UserError'),
  'align': ('mergejax.align', None),
  'analogy': ('mergejax.methods.arithmetic', 'analogy'),
  'analysis': ('mergejax.analysis', None),
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
  'methods': ('mergejax.methods', None),
  'model_stock': ('mergejax.methods.sphere', 'model_stock'),
  'models': ('mergejax.models', None),
  'multislerp': ('mergejax.methods.sphere', 'multislerp'),
  'nearswap': ('mergejax.methods.swap', 'nearswap'),
  'negate': ('mergejax.methods.arithmetic', 'negate'),
  'nuslerp': ('mergejax.methods.sphere', 'nuslerp'),
  'open_checkpoint': ('mergejax.checkpoints.checkpoint', 'open_checkpoint'),
  'partition': ('mergejax.partition', None),
  'passthrough': ('mergejax.methods.mean', 'passthrough'),
  'plan': ('mergejax.merging.disk.planner', 'plan'),
  'ram': ('mergejax.methods.ram', 'ram'),
  'ram_plus': ('mergejax.methods.ram', 'ram_plus'),
  'regmean': ('mergejax.methods.regmean', 'regmean'),
  'save_checkpoint': ('mergejax.checkpoints.checkpoint', 'save_checkpoint'),
  'sce': ('mergejax.methods.select_erase', 'sce'),
  'search': ('mergejax.search', None),
  'select': ('mergejax.select', None),
  'slerp': ('mergejax.methods.sphere', 'slerp'),
  'stats': ('mergejax.statistics', None),
  'task_arithmetic': ('mergejax.methods.arithmetic', 'task_arithmetic'),
  'training': ('mergejax.training', None),
  'ties': ('mergejax.methods.ties', 'ties'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
__all__ += ['__version__']
