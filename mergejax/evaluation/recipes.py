# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models to evaluate by path: checkpoints, and merges that recipes describe."""

import os
import pathlib
import tempfile
from typing import Any

import flax.linen as nn

from mergejax import adapters
from mergejax import models
from mergejax.core import typing
from mergejax.merging.disk import executor
from mergejax.merging.disk import planner
from mergejax.merging.recipes import recipe as recipe_lib


def load_merged(
  recipe: os.PathLike | str | dict[str, Any],
) -> tuple[nn.Module, typing.Tree]:
  """Module and parameters of a merge that a recipe describes.

  The merge is made on disk, in a temporary folder, as `mergejax merge` does.

  Args:
    recipe: a YAML file, or what one holds.

  Raises:
    UserError: a recipe or models that do not fit; see `recipe.load_recipe` and
      `planner.plan`.
  """
  if isinstance(recipe, dict):
    parsed = recipe_lib.parse_recipe(recipe)
  else:
    parsed = recipe_lib.load_recipe(recipe)
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / 'merged'
    executor.execute(planner.plan(parsed), out)
    return models.load_model(out)


def load(path: os.PathLike | str) -> tuple[nn.Module, typing.Tree]:
  """Module and parameters of a checkpoint, a recipe (`.yaml`), or BASE+ADAPTER."""
  if pathlib.Path(path).suffix in ('.yaml', '.yml'):
    return load_merged(path)
  return adapters.load_model(path)
