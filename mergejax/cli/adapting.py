# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train` with an adapter: what is trained, and what is written."""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax

from mergejax import adapters
from mergejax import models
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import typing


def adapted(
  module: nn.Module | models.ModelFamily,
  adapter: adapters.Adapter | None,
  restore: str,
) -> Any:
  """The module as it is, or the family of it with an adapter.

  Raises:
    ConfigError: the moments of another run are asked for; the adapter does not
      fit the model.
  """
  if adapter is None:
    return module
  if restore == 'state':
    raise errors.ConfigError(
      "restore='state' takes the moments of a model's parameters, but an adapter "
      "is trained, which has none there: set restore='params'."
    )
  return adapters.adapt(module, adapter)


def export(
  path: pathlib.Path,
  family: adapters.Adapted,
  params: typing.Tree,
  base: os.PathLike | str | None,
) -> None:
  """Writes the adapter of a run, in PEFT's files if they have such a one.

  Args:
    path: a folder; one that is there is replaced.
    family: from `adapted`.
    params: of the adapted model.
    base: what it began from.
  """
  if jax.process_count() > 1:
    params = partition.to_host(params)
  if jax.process_index() != 0:
    return
  name = None if base is None else os.fspath(base)
  if adapters.has_layout(family.adapter):
    adapters.save(path, family, params, base_name=name, overwrite=True)
    return
  _, own = family.split(params)
  axes = {p: spec.axes for p, spec in family.adapter_specs.items()}
  checkpoint.save_checkpoint(path, own, overwrite=True, axes=axes)
