# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Branch-Train-Merge, from text to report.

A seed language model is trained on the mixture of all domains and copied once
per domain; the copies train side by side, each on its own domain, while a dense
model goes on with the mixture at the same total compute. Experts are then
merged in weight space and mixed in output space, and everything is evaluated on
every domain.

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import time
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
from mergejax.evaluation import base as evaluation_base
from mergejax.evaluation import expert_table
from mergejax.evaluation import plots
from mergejax.evaluation import report
from mergejax.evaluation import suite as suite_lib
from mergejax.experts import branch
from mergejax.training import batches
from mergejax.training import checkpoints
from mergejax.training import objective as objective_lib
from mergejax.training import optim
from mergejax.training import trainer as trainer_lib
from mergejax.training import transforms as transforms_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is trained, how long, and on what; bound by gin.

  Numbers that a gin file sets have no default here.

  Attributes:
    corpora: folder with one file or folder of text per domain; None takes the
      text that comes with Python (see `machine_text`).
    module: the language model.
    optimizer: for all phases; a function such as `optim.adafactor` is called
      with `steps=`, so that its learning rate spans seed and branch steps.
    model_dir: where everything goes.
    seed_steps: updates of the seed on the mixture.
    branch_steps: updates of every expert, and of the dense model.
    batch_size: rows of the seed's and of each expert's batch; the dense model's
      is K times larger.
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
    scales: task arithmetic's candidates, chosen on validation.
    max_train_bytes: training text per domain; None keeps all.
    validation_sequences: rows per domain for choosing scales and priors.
    test_sequences: rows per domain of the final table.
    save_every: steps between checkpoints.
  """

  module: nn.Module
  optimizer: optim.OptimizerLike
  model_dir: os.PathLike | str
  seed_steps: int
  branch_steps: int
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
  scales: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
  validation_sequences: int = 128
  test_sequences: int = 256
  save_every: int = 250

  @property
  def directory(self) -> pathlib.Path:
    return pathlib.Path(self.model_dir).expanduser()


def run(settings: Callable[[], Settings] | Settings) -> None:
  """The job: text, training, merging, evaluation, report."""
  settings = settings() if callable(settings) else settings
  total = settings.seed_steps + settings.branch_steps
  settings = dataclasses.replace(
    settings, optimizer=train.optimizer_of(settings.optimizer, total)
  )
  started = time.monotonic()
  table_file = settings.directory / 'table.json'
  same_run.check(
    settings.directory / 'settings.json',
    describe(settings),
    layout(settings),
  )
  if table_file.exists():
    print((settings.directory / 'report.md').read_text())
    print(
      f'{settings.directory} is complete; nothing was computed. Remove it, '
      'or name another folder, to train again.'
    )
    return
  task_of, mixture = prepare_data(settings)
  trained = train_all(settings, task_of, mixture)
  say('evaluating')
  suite = suite_lib.of_corpora(
    task_of, length=settings.length, batch_size=settings.batch_size
  )
  table, roles, chosen, best_merge = expert_table.evaluate(
    settings.module,
    trained,
    validation=suite.read('validation', limit=settings.validation_sequences),
    test=suite.read('test', limit=settings.test_sequences),
    scales=settings.scales,
    batch_size=settings.batch_size,
  )
  checkpoints.export(
    settings.directory / 'checkpoints' / 'best_merge',
    settings.module,
    best_merge,
  )
  if jax.process_index() == 0:
    write_report(settings, table, roles, chosen, time.monotonic() - started)


def say(text: str) -> None:
  """One line about the phase, from the first process."""
  if jax.process_index() == 0:
    print(text, flush=True)


# What runs of before did not have; said of a run that has it.
_ADDED = ('objective', 'transforms', 'freeze', 'accumulate', 'clip')


def describe(settings: Settings) -> dict[str, Any]:
  """The settings that make two runs the same, as plain data."""
  left_out = {
    'module', 'optimizer', 'model_dir', 'mesh', 'save_every', 'rules',
    *_ADDED,
  }  # fmt: skip
  fields = {
    field.name: getattr(settings, field.name)
    for field in dataclasses.fields(settings)
    if field.name not in left_out
  }
  fields['corpora'] = (
    None if settings.corpora is None else str(settings.corpora)
  )
  fields['scales'] = list(settings.scales)
  fields['model'] = models.describe(settings.module)
  fields['optimizer'] = optim.describe(settings.optimizer)
  added = {name: getattr(settings, name) for name in _ADDED}
  return {**fields, **train.described(**added)}


def layout(settings: Settings) -> dict[str, Any]:
  """Where the run computes: it may go on elsewhere, and is told to."""
  return {
    'mesh': None if settings.mesh is None else dict(settings.mesh),
    'devices': jax.device_count(),
    'processes': jax.process_count(),
  }


def prepare_data(settings: Settings) -> tuple[dict[str, str], str]:
  """Splits the text, checks its size, registers a task per domain.

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
    same_run.write(settings_file, describe(settings), layout(settings))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('corpora')
  task_of = tasks.add_corpora(folder, vocabulary)
  mixture = mixtures.add_mixture(
    'branch_train_merge', list(task_of.values()), rates='equal', by_content=True
  )
  return task_of, mixture.name


def write_corpora(settings: Settings, folder: pathlib.Path) -> None:
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
  settings: Settings, experts: int, devices: Sequence[Any] | None = None
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


def train_all(
  settings: Settings, task_of: Mapping[str, str], mixture: str
) -> expert_table.Models:
  """Seed, experts and dense model; every phase continues where it stopped."""
  domains = list(task_of)
  side_by_side, single = make_meshes(settings, len(domains))
  rows = settings.batch_size
  total = settings.seed_steps + settings.branch_steps
  data_seed = 1000 * settings.seed
  # Streams are not named: shuffle buffers must not outlive their phase.
  state = _phase(
    settings, 'seed', _stream(settings, mixture, rows, data_seed),
    steps=settings.seed_steps, mesh=single,
  )  # fmt: skip
  # Experts and dense model start from the very same host copy.
  seed = partition.to_host(state)
  mine = branch.local_experts(side_by_side, len(domains))
  experts = _phase(
    settings,
    'experts',
    branch.StackedStream(
      [
        _stream(settings, task_of[domains[i]], rows, data_seed + 1 + i)
        for i in mine
      ],
      mine,
    ),
    steps=total,
    mesh=side_by_side,
    state=seed,
    experts=domains,
  )
  dense = _phase(
    settings, 'dense',
    _stream(settings, mixture, len(domains) * rows, data_seed + 999),
    steps=total, mesh=single, state=seed,
  )  # fmt: skip
  trained = expert_table.Models(
    seed.params,
    partition.to_host(experts.params),
    partition.to_host(dense.params),
  )
  _export(settings, trained, domains)
  return trained


def _stream(settings, name, rows, seed):
  """Batches of a task or mixture."""
  return stream_lib.SeqioStream(
    name,
    lengths={'targets': settings.length},
    batch_size=rows,
    pack=False,  # rows of a text task are full already
    seed=seed,
  )


def _phase(settings, name, stream, *, steps, mesh, state=None, experts=None):
  """The trained state of a phase, on its mesh."""
  shared = dict(
    mesh=mesh,
    objective=train.objective_of(settings.objective, settings.loss),
    rules=settings.rules,
    transforms=settings.transforms,
    callbacks=train.trainer_callbacks(),
    freeze=settings.freeze,
    accumulate=settings.accumulate,
    clip=settings.clip,
  )
  model = settings.module, settings.optimizer
  if experts is None:
    trainer = trainer_lib.Trainer(*model, **shared)
  else:
    trainer = branch.BranchTrainer(*model, experts=experts, **shared)
  return trainer.fit(
    stream,
    steps=steps,
    directory=settings.directory / 'train' / name,
    key=jax.random.key(settings.seed),
    state=state,
    save_every=settings.save_every,
    phase=name,
  )


def _export(settings, trained, domains):
  """Saves every model as one that can be loaded."""
  folder = settings.directory / 'checkpoints'
  checkpoints.export(folder / 'seed', settings.module, trained.seed)
  checkpoints.export(folder / 'dense', settings.module, trained.dense)
  for i, domain in enumerate(domains):
    checkpoints.export(
      folder / 'experts' / domain,
      settings.module,
      branch.unstack(trained.experts, i),
    )


def write_report(
  settings: Settings,
  table: evaluation_base.Table,
  roles: report.Roles,
  chosen: Mapping[str, Any],
  seconds: float,
) -> None:
  """Writes `heatmap.png`, `report.md` and, last, `table.json`; prints."""
  directory = settings.directory
  held = report.expectations(table, roles)
  plots.heatmap(table, roles.seed, directory / 'heatmap.png')
  verdicts = [
    f'- {"held" if ok else "did NOT hold"}: {t}' for t, ok in held.items()
  ]
  advice = [f'- {line}' for line in report.advice(table, roles)]
  lines = [
    '# Branch-Train-Merge',
    '',
    f'{len(roles.experts)} experts branched from a seed of '
    f'{settings.seed_steps} steps, {settings.branch_steps} steps each, '
    f'batches of {settings.batch_size} x {settings.length} tokens, seed '
    f'{settings.seed}, on {jax.device_count()} {jax.devices()[0].platform} '
    f'device(s), {seconds:.0f} s since this command started.',
    '',
    'Bits per byte on the test set of every domain, lower is better, with '
    'the 95% bootstrap interval over '
    f'{settings.test_sequences} sequences at most; the mean is over domains. '
    'The posterior average has its own weights for every domain.',
    '',
    table.to_markdown(),
    '',
    '![heat map](heatmap.png)',
    '',
    '## What was expected',
    '',
    *verdicts,
    '',
    '## Which model to use',
    '',
    *advice,
    '',
    f'Chosen on validation: task arithmetic scale '
    f'{chosen["task_arithmetic_scale"]:g}; best merge: '
    f'{chosen["best_merge"]}.',
    '',
  ]
  (directory / 'report.md').write_text('\n'.join(lines))
  train.save_json(
    directory / 'table.json',
    {
      'table': table.to_json(tasks='domains', value='bits_per_byte'),
      'expected': held,
      'chosen': dict(chosen),
      'settings': describe(settings),
      'seconds': seconds,
    },
  )
  print(table.to_text())
  print('\n'.join(['', *verdicts, '', 'Which model to use:', *advice]))
  print(f'\n{directory / "report.md"}')
