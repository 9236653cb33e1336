# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax import adapters
from mergejax import align
from mergejax import analysis
from mergejax import evaluation
from mergejax import experts
from mergejax import methods
from mergejax import models
from mergejax import partition
from mergejax import search
from mergejax import select
from mergejax import statistics as stats
from mergejax import training
from mergejax.checkpoints.checkpoint import open_checkpoint
from mergejax.checkpoints.checkpoint import save_checkpoint
from mergejax.core.errors import CheckpointError
from mergejax.core.errors import ConfigError
from mergejax.core.errors import DataError
from mergejax.core.errors import RecipeError
from mergejax.core.errors import Stopped
from mergejax.core.errors import StructureError
from mergejax.core.errors import UserError
from mergejax.merging.api import merge
from mergejax.merging.disk.executor import execute
from mergejax.merging.disk.planner import plan
from mergejax.merging.recipes.recipe import load_recipe
from mergejax.methods.arithmetic import analogy
from mergejax.methods.arithmetic import negate
from mergejax.methods.arithmetic import task_arithmetic
from mergejax.methods.base import Merge
from mergejax.methods.fisher import fisher
from mergejax.methods.mean import interpolate
from mergejax.methods.mean import linear
from mergejax.methods.mean import passthrough
from mergejax.methods.ram import ram
from mergejax.methods.ram import ram_plus
from mergejax.methods.regmean import regmean
from mergejax.methods.select_erase import sce
from mergejax.methods.sphere import karcher
from mergejax.methods.sphere import model_stock
from mergejax.methods.sphere import multislerp
from mergejax.methods.sphere import nuslerp
from mergejax.methods.sphere import slerp
from mergejax.methods.swap import arcee_fusion
from mergejax.methods.swap import nearswap
from mergejax.methods.ties import breadcrumbs
from mergejax.methods.ties import breadcrumbs_ties
from mergejax.methods.ties import dare_linear
from mergejax.methods.ties import dare_ties
from mergejax.methods.ties import della
from mergejax.methods.ties import della_linear
from mergejax.methods.ties import ties
from mergejax.models import load_model
from mergejax.partition.meshes import make_mesh

__version__: str

__all__ = [
  'CheckpointError',
  'ConfigError',
  'DataError',
  'Merge',
  'RecipeError',
  'Stopped',
  'StructureError',
  'UserError',
  'adapters',
  'align',
  'analogy',
  'analysis',
  'arcee_fusion',
  'breadcrumbs',
  'breadcrumbs_ties',
  'dare_linear',
  'dare_ties',
  'della',
  'della_linear',
  'evaluation',
  'execute',
  'experts',
  'fisher',
  'interpolate',
  'karcher',
  'linear',
  'load_model',
  'load_recipe',
  'make_mesh',
  'merge',
  'methods',
  'model_stock',
  'models',
  'multislerp',
  'nearswap',
  'negate',
  'nuslerp',
  'open_checkpoint',
  'partition',
  'passthrough',
  'plan',
  'ram',
  'ram_plus',
  'regmean',
  'save_checkpoint',
  'sce',
  'search',
  'select',
  'slerp',
  'stats',
  'task_arithmetic',
  'ties',
  'training',
  '__version__',
]
