# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The model that a command asks: from its checkpoint, on its devices."""

from collections.abc import Iterable, Mapping
import importlib
import os
import pathlib

import flax.linen as nn
import jax

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.cli import start
from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import recipes
from mergejax.experts import forest as forest_lib
from mergejax.experts import mixture as mixture_lib
from mergejax.training import batches

DTYPES = ('float32', 'bfloat16')


def load(
  path: os.PathLike | str,
  *,
  module: nn.Module | models.ModelFamily | None = None,
  step: int | None = None,
  dtype: str = 'float32',
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[models.ModelFamily, typing.Tree]:
  """A model and its parameters, on the devices.

  Args:
    path: a checkpoint, a run's folder, a recipe (`.yaml`), or a forest, whose
      experts answer together with equal priors.
    module: of a checkpoint that does not say what it is of, such as T5X's; by
      default what its `config.json` says.
    step: of a run's folder; its last by default.
    dtype: 'bfloat16' rounds the parameters to it, as T5X's `infer.gin` does.
    mesh: spreads the parameters by the standard rules; by default they are on
      the first device.

  Raises:
    UserError: the checkpoint is missing, or of another model; a module for a
      recipe or a forest.
  """
  if dtype not in DTYPES:
    raise errors.ConfigError(errors.near(str(dtype), DTYPES, 'dtype'))
  recipe = pathlib.Path(path).suffix in ('.yaml', '.yml')
  forest = forest_at(path)
  if (recipe or forest) and (module is not None or step is not None):
    raise errors.ConfigError(
      f'{path} is a {"recipe" if recipe else "forest"}, whose models say what '
      'they are: leave the module and the step out.'
    )
  if forest:
    return _together(forest, mesh, dtype)
  if module is None:
    source = path if recipe else checkpoint.at_step(path, step)
    module, params = recipes.load(source)
    family = models.family_of(module)
  else:
    family = models.family_of(module)
    read = start.Start(path, step=step).check(family.module).read
    params = read(None)
  params = _rounded(params, dtype)
  if mesh is None:
    return family, jax.device_put(params)
  axes = {name: spec.axes for name, spec in family.specs().items()}
  layout = partition.shardings(mesh, params, axes, partition.standard())
  return family, jax.tree.map(batches.whole, params, layout)


def forest_at(path: os.PathLike | str) -> forest_lib.Forest | None:
  """The forest at a path; None if something else is there, or nothing."""
  manifest = pathlib.Path(path).expanduser() / forest_lib.MANIFEST
  return forest_lib.Forest(path) if manifest.is_file() else None


def check_vocabulary(path: os.PathLike | str, tasks: Iterable[str]) -> None:
  """Raises if a forest was trained with another vocabulary than tasks have.

  Args:
    path: of a model; only a forest knows its vocabulary.
    tasks: names in seqio. Of vocabularies that are neither of bytes nor of a
      SentencePiece file nothing is known.

  Raises:
    ConfigError: see `Forest.check_vocabulary`.
  """
  forest = forest_at(path)
  if forest is None:
    return
  seqio = importlib.import_module('seqio')  # takes seconds
  for name in tasks:
    known = (
      seqio.get_mixture_or_task(name).output_features['targets'].vocabulary
    )
    if isinstance(known, seqio.ByteVocabulary):
      forest.check_vocabulary('bytes')
    elif isinstance(known, seqio.SentencePieceVocabulary):
      forest.check_vocabulary(known.sentencepiece_model_file)


def _rounded(params, dtype):
  if dtype == 'float32':
    return params
  return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _together(forest, mesh, dtype):
  """The experts of a forest as one model; the prior is not rounded."""
  names = forest.names()
  mixture = mixture_lib.Mixture(forest.module, experts=len(names), mesh=mesh)
  experts = [_rounded(forest.params(name), dtype) for name in names]
  return mixture, mixture.join(experts)


def mesh_of(sizes: Mapping[str, int] | None) -> jax.sharding.Mesh | None:
  """The mesh of a run of gin; None on the only device of a machine.

  Args:
    sizes: for `partition.make_mesh`; all devices side by side by default.

  Raises:
    ConfigError: sizes that do not fit the devices.
  """
  mesh = partition.make_mesh(**(sizes or {}))
  return mesh if mesh.size > 1 else None
