# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a callback may know of the run that calls it."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

import jax
import optax

from mergejax import models
from mergejax.core import errors
from mergejax.training import transforms as transforms_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """One call of `Trainer.fit`.

  Attributes:
    family: of the model.
    mesh: where it runs.
    steps: the step number to reach.
    phase: its name, for people.
    directory: where it is kept, or None.
    experts: names of the experts that train side by side, or None.
    transforms: `{name: step transform}`.
    optimizer: the one of this run.
  """

  family: models.ModelFamily
  mesh: jax.sharding.Mesh
  steps: int
  phase: str = 'train'
  directory: pathlib.Path | None = None
  experts: Sequence[str] | None = None
  transforms: Mapping[str, transforms_lib.StepTransform] = dataclasses.field(
    default_factory=dict
  )
  optimizer: optax.GradientTransformation | None = None

  def folder(self, what: str) -> pathlib.Path:
    """The run's folder, for something that must have one.

    Raises:
      ConfigError: the run is not kept anywhere.
    """
    if self.directory is None:
      raise errors.ConfigError(
        f'The callback {what} needs a folder: give it one, or call fit with '
        'directory=.'
      )
    return self.directory
