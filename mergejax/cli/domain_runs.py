# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What runs over domains of text share: settings, data, meshes, phases."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import multihost_utils

from mergejax import models
from mergejax import partition
from mergejax.cli import same_run
from mergejax.cli import train
from mergejax.core import files
from mergejax.data import corpora as corpora_lib
from mergejax.data import features
from mergejax.data import machine_text
from mergejax.data import mixtures
from mergejax.data import stream as stream_lib
from mergejax.data import tasks
from mergejax.experts import branch
from mergejax.training import batches
from mergejax.training import callbacks as callbacks_lib
from mergejax.training import objective as objective_lib
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import trainer as trainer_lib
from mergejax.training import transforms as transforms_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainSettings:
  """What is trained and on what; bound by gin.

  Numbers that a gin file sets have no default here.

  Attributes:
    corpora: folder with one file or folder of text per domain; None takes the
      text that comes with Python (see `machine_text`).
    module: the language model.
    optimizer: for all phases; a function such as `optim.adafactor` is called
      with `steps=`, so that its learning rate spans seed and branch steps.
    model_dir: where everything goes.
    batch_size: rows of the seed's and of each expert's batch.
    length: tokens of a row.
    vocabulary: `'bytes'` or a SentencePiece file.
    seed: seeds parameters and data order.
    mesh: sizes of the mesh axes `branch` and `data`; by default as many
      branches as divide both experts and devices, and as much `data` as
      divides the rows and what is left.
    loss: options of `objective.cross_entropy`.
    objective: what is minimised, instead.
    rules: what lies where on a mesh; see `partition.ShardingRules`.
    transforms: what a step does besides; see `training.transforms`.
    freeze: see `step.make_step`.
    accumulate: likewise.
    clip: likewise.
    max_train_bytes: training text per domain; None keeps all.
    validation_sequences: rows per domain for choosing scales and priors.
    test_sequences: rows per domain of the final table.
    save_every: steps between checkpoints.
  """

  module: nn.Module
  optimizer: optim.OptimizerLike
  model_dir: os.PathLike | str
  batch_size: int
  length: int
  max_train_bytes: int | None
  seed: int
  corpora: os.PathLike | str | None = None
  vocabulary: str = 'bytes'
  mesh: Mapping[str, int] | None = None
  loss: Mapping[str, Any] | None = None
  objective: objective_lib.Objective | None = None
  rules: partition.ShardingRules | None = None
  transforms: Sequence[transforms_lib.StepTransform] = ()
  freeze: Sequence[str] = ()
  accumulate: int = 1
  clip: float | None = None
  validation_sequences: int = 128
  test_sequences: int = 256
  save_every: int = 250

  @property
  def directory(self) -> pathlib.Path:
    return pathlib.Path(self.model_dir).expanduser()


def say(text: str) -> None:
  """One line about the phase, from the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


# What runs of before did not have; said of a run that has it.
_ADDED = ('objective', 'transforms', 'freeze', 'accumulate', 'clip')


def describe(settings: DomainSettings, *aside: str) -> dict[str, Any]:
  """The settings that make two runs the same, as plain data.

  Args:
    settings: of the run.
    *aside: names of further settings that make no other run.
  """
  left_out = {
    'module', 'optimizer', 'model_dir', 'mesh', 'save_every', 'rules',
    *_ADDED, *aside,
  }  # fmt: skip
  fields = {
    field.name: _plain(getattr(settings, field.name))
    for field in dataclasses.fields(settings)
    if field.name not in left_out
  }
  fields['corpora'] = (
    None if settings.corpora is None else str(settings.corpora)
  )
  fields['model'] = models.describe(settings.module)
  fields['optimizer'] = optim.describe(settings.optimizer)
  added = {name: getattr(settings, name) for name in _ADDED}
  return {**fields, **train.described(**added)}


def _plain(value):
  return list(value) if isinstance(value, tuple) else value


def layout(settings: DomainSettings) -> dict[str, Any]:
  """Where the run computes: it may go on elsewhere, and is told to."""
  return {
    'mesh': None if settings.mesh is None else dict(settings.mesh),
    'devices': jax.device_count(),
    'processes': jax.process_count(),
  }


def prepare_data(
  settings: DomainSettings,
  described: Mapping[str, Any],
  check: Callable[[Sequence[str]], None] = lambda domains: None,
) -> tuple[dict[str, str], str]:
  """Splits the text, checks its size, registers a task per domain.

  Args:
    settings: of the run.
    described: them as plain data, noted once the text is there and checked: a
      run that is refused may be asked for otherwise in the same folder.
    check: called with the domains; it may raise.

  Returns:
    `({domain: task name}, the name of the mixture of all)`.
  """
  vocabulary = features.vocabulary(settings.vocabulary)
  train.check_vocabulary(vocabulary, settings.module)
  folder = settings.directory / 'corpora'
  settings_file = settings.directory / 'settings.json'
  # A run that continues keeps its text, whatever became of the sources.
  if jax.process_index() == 0 and not settings_file.exists():
    write_corpora(settings, folder)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('corpora')
  task_of = tasks.add_corpora(folder, vocabulary)
  check(list(task_of))
  same_run.write(settings_file, described, layout(settings))
  mixture = mixtures.add_mixture(
    'branch_train_merge', list(task_of.values()), rates='equal', by_content=True
  )
  return task_of, mixture.name


def write_corpora(settings: DomainSettings, folder: pathlib.Path) -> None:
  """Writes the split text; all of it is checked before the folder appears."""
  if settings.corpora is None:
    domains = machine_text.domains()
  else:
    domains = corpora_lib.read_folder(tasks.locate(settings.corpora))
  least = {
    'train': settings.batch_size * settings.length,
    'validation': settings.length,
    'test': settings.length,
  }
  with files.atomic_path(folder, overwrite=True) as temporary:
    sizes = corpora_lib.write_splits(
      domains, temporary, max_train_bytes=settings.max_train_bytes
    )
    corpora_lib.check_sizes(sizes, least)
  for domain, size in sizes.items():
    kilobytes = [f'{split} {size[split] / 1e3:,.0f} kB' for split in size]
    say(f'  {domain:<24}' + '  '.join(kilobytes))


def make_meshes(
  settings: DomainSettings, experts: int, devices: Sequence[Any] | None = None
) -> tuple[jax.sharding.Mesh, jax.sharding.Mesh]:
  """The mesh of the experts, and that of a single model.

  Args:
    settings: of the run.
    experts: how many.
    devices: as of `partition.make_mesh`.

  Raises:
    UserError: a mesh that experts or rows do not divide over.
  """
  count = len(jax.devices() if devices is None else devices)
  sizes = settings.mesh
  if sizes is None:
    branches = math.gcd(experts, count)
    rest = count // branches
    # What rows do not divide over repeats them.
    data = math.gcd(settings.batch_size, rest)
    sizes = dict(branch=branches, data=data, expert=rest // data)
  side_by_side = partition.make_mesh(devices=devices, **sizes)
  branch.check_experts(experts, side_by_side)
  batches.check_rows(
    'A batch of an expert', settings.batch_size, side_by_side,
    settings.rules or partition.standard(),
  )  # fmt: skip
  # Rows that do not divide over all devices are repeated on the rest.
  data = math.gcd(settings.batch_size, count)
  single = partition.make_mesh(branch=count // data, data=data, devices=devices)
  return side_by_side, single


def stream(
  settings: DomainSettings, name: str, rows: int, seed: int
) -> stream_lib.SeqioStream:
  """Batches of a task or mixture."""
  return stream_lib.SeqioStream(
    name,
    lengths={'targets': settings.length},
    batch_size=rows,
    pack=False,  # rows of a text task are full already
    seed=seed,
  )


def trainer(
  settings: DomainSettings,
  mesh: jax.sharding.Mesh,
  experts: Sequence[str] | None = None,
  *,
  callbacks: Sequence[callbacks_lib.Callback] = (),
  **side_by_side: Any,
) -> trainer_lib.Trainer:
  """The trainer of one model, or of experts side by side.

  Args:
    settings: of the run.
    mesh: where.
    experts: names of those that train side by side; None: one model.
    callbacks: besides those of every run.
    **side_by_side: further arguments of `BranchTrainer`.
  """
  shared = dict(
    mesh=mesh,
    objective=train.objective_of(settings.objective, settings.loss),
    rules=settings.rules,
    transforms=settings.transforms,
    callbacks=train.trainer_callbacks(callbacks),
    freeze=settings.freeze,
    accumulate=settings.accumulate,
    clip=settings.clip,
  )
  model = settings.module, settings.optimizer
  if experts is None:
    return trainer_lib.Trainer(*model, **shared)
  return branch.BranchTrainer(*model, experts=experts, **side_by_side, **shared)


def phase(
  settings: DomainSettings,
  name: str,
  batches_of: Any,
  *,
  steps: int,
  mesh: jax.sharding.Mesh,
  state: Any = None,
  experts: Sequence[str] | None = None,
  **more: Any,
) -> state_lib.TrainState:
  """The trained state of a phase, on its mesh; it continues where it stopped.

  Args:
    settings: of the run.
    name: of the phase, and of its folder in `train`.
    batches_of: its stream.
    steps: the step number to reach.
    mesh: where.
    state: see `Trainer.fit`.
    experts: names of those that train side by side; None: one model.
    **more: see `trainer`.
  """
  return trainer(settings, mesh, experts, **more).fit(
    batches_of,
    steps=steps,
    directory=settings.directory / 'train' / name,
    key=jax.random.key(settings.seed),
    state=state,
    save_every=settings.save_every,
    phase=name,
  )
