# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train --gin_file=... --gin.NAME=VALUE`: what a gin file describes.

A gin file names a job, a function of this package or of the user's, and binds
its arguments: `train.run.job = @branch_train_merge.run`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import pathlib
import re
import sys
from typing import Any

import flax.linen as nn
import jax
import optax
import seqio

from mergejax import adapters
from mergejax import models
from mergejax import partition
from mergejax.checkpoints import assignment
from mergejax.cli import adapting
from mergejax.cli import gin_run
from mergejax.cli import same_run
from mergejax.cli import start as start_lib
from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.data import mixtures
from mergejax.data import splits
from mergejax.data import stream as stream_lib
from mergejax.data import task_ids
from mergejax.training import batches
from mergejax.training import callbacks as callbacks_lib
from mergejax.training import checkpoints
from mergejax.training import objective as objective_lib
from mergejax.training import optim
from mergejax.training import peers
from mergejax.training import routing_pictures
from mergejax.training import streams
from mergejax.training import trainer as trainer_lib
from mergejax.training import transforms as transforms_lib


def run(job: Callable[[], Any]) -> None:
  """Runs the job that a gin file binds."""
  job()


def main(arguments: Sequence[str]) -> None:
  """Parses T5X's flags and runs the job."""
  gin_run.run('train', 'Train what gin files describe.', run, arguments)


def trainer_callbacks(
  callbacks: Sequence[callbacks_lib.Callback] = (),
) -> list[callbacks_lib.Callback]:
  """Progress, JSON lines, TensorBoard, pictures, and the user's before them."""
  return [
    *callbacks,
    peers.watch_peers(),
    callbacks_lib.progress(),
    callbacks_lib.jsonl(),
    callbacks_lib.tensorboard(),
    routing_pictures.routing(),
  ]


def train_model(
  *,
  module: nn.Module | models.ModelFamily,
  optimizer: optim.OptimizerLike,
  mixture_or_task: Callable[[], Any] | str,
  model_dir: os.PathLike | str,
  steps: int,
  batch_size: int,
  lengths: Mapping[str, int],
  kind: str = 'encoder_decoder',
  pack: bool = True,
  seed: int,
  save_every: int,
  initial_checkpoint: os.PathLike | str | None = None,
  restore: str = 'params',
  restore_step: int | None = None,
  restore_rules: assignment.Rules | None = None,
  fallback_to_scratch: bool = False,
  pad_vocabulary: bool = False,
  log_every: int = 10,
  loss: Mapping[str, Any] | None = None,
  objective: objective_lib.Objective | None = None,
  mesh: Mapping[str, int] | None = None,
  rules: partition.ShardingRules | None = None,
  transforms: Sequence[transforms_lib.StepTransform] = (),
  callbacks: Sequence[callbacks_lib.Callback] = (),
  freeze: Sequence[str] = (),
  accumulate: int = 1,
  clip: float | None = None,
  per_task: bool = False,
  cache_dir: os.PathLike | str | None = None,
  allow_float16: bool = False,
  adapter: adapters.Adapter | None = None,
  adapter_start: adapters.Start | None = None,
  router_optimizer: optim.OptimizerLike | None = None,
  choices: bool = False,
) -> None:
  r"""The job that trains one model on one task or mixture.

  Args:
    module: a T5 or a language model.
    optimizer: from `training.optim`; a function such as `optim.adafactor` is
      called with `steps=`.
    mixture_or_task: a name registered in seqio, or a function that registers
      one and returns it (`@tasks.add_table_task()` in gin).
    model_dir: where everything goes; the same command continues a run there.
    steps: updates in all.
    batch_size: rows over all processes.
    lengths: tokens per feature; longer examples are cut, with a warning.
    kind: `'encoder_decoder'`, `'lm'` or `'prefix_lm'`.
    pack: put several examples into one row.
    seed: seeds parameters, data order and dropout.
    save_every: steps between checkpoints.
    initial_checkpoint: what to start from, of any format, or a run's folder;
      its layers may be stacked or not, whatever the module's are. Fresh
      parameters by default.
    restore: `'params'`, from step 0; or `'state'`: with its moments and step
      number, of T5X's Adafactor or of a run of ours. `steps` counts those
      before then, as in T5X.
    restore_step: of a run's folder; its last by default.
    restore_rules: start from some of its parameters, or by other names:
      `[('decoder/(.*)', r'old_decoder/\1'), ('.*logits_dense.*', None)]`; None
      is for fresh ones. See `models.load_params`.
    fallback_to_scratch: parameters that it does not have are fresh.
    pad_vocabulary: its vocabulary may be padded otherwise.
    log_every: steps between logged metrics.
    loss: options of `objective.cross_entropy`.
    objective: what is minimised, instead: a function of your own by its import
      path, `@my_file.objective`.
    mesh: sizes for `partition.make_mesh`.
    rules: what lies where on it: `@partition.fsdp()`.
    transforms: for example `[@transforms.ema()]`.
    callbacks: for example `[@scoring.evaluate()]`.
    freeze: see `step.make_step`.
    accumulate: likewise.
    clip: likewise.
    per_task: log the loss of every task of a mixture, and how many of its
      examples were drawn; see `transforms.task_metrics`. An objective of your
      own tells tasks apart by `objective.by_task`.
    cache_dir: read tasks from where `mergejax cache` wrote them.
    allow_float16: see `trainer.Trainer`.
    adapter: what is trained instead of the model, `@adapters.lora()` for
      example; the model stays as `initial_checkpoint` has it, and
      MODEL_DIR/adapter is the result. One of several tasks is told which task
      each row is of, by number in the order of the tasks' names, and leaves an
      adapter for each in MODEL_DIR/adapters where PEFT has such files.
    adapter_start: what it begins from, `@adapters.from_saved()` for example;
      fresh by default.
    router_optimizer: of what routes, logits of `poly` and the sub-network of
      `attempt`; by default `optimizer` is that of all.
    choices: rows come with all of their answers, which `@choices.t_few()`
      learns from, of tasks of `answers.add_choice_task`.
  """
  directory = pathlib.Path(model_dir)
  start = start_lib.Start(
    initial_checkpoint, restore, restore_step, restore_rules,
    fallback_to_scratch, pad_vocabulary,
  )  # fmt: skip
  begin = start.check(module)
  family = adapting.adapted(
    module, adapter, restore, adapter_start, initial_checkpoint
  )
  name = getattr(mixture_or_task, 'name', mixture_or_task)
  if cache_dir is not None:
    seqio.add_global_cache_dirs([os.fspath(cache_dir)])
  provider = stream_lib.find(name, 'train', cached=cache_dir is not None)
  names = task_ids.names(provider)
  if adapter is not None:
    adapting.check_tasks(family, names)
  if per_task:
    transforms = [*transforms, transforms_lib.task_metrics(names)]
    if objective is None:
      loss = {**(loss or {}), 'tasks': len(names)}
  record = directory / 'run.json'
  optimizers = [
    each and optimizer_of(each, steps) for each in (optimizer, router_optimizer)
  ]
  trainer = trainer_lib.Trainer(
    family, adapting.optimizer_of(family, *optimizers),
    objective=objective_of(objective, loss),
    mesh=partition.make_mesh(**(mesh or {})), rules=rules,
    transforms=transforms, callbacks=trainer_callbacks(callbacks),
    freeze=freeze, accumulate=accumulate, clip=clip,
    allow_float16=allow_float16,
  )  # fmt: skip
  stream, data, local_rows = _open_data(
    trainer, provider, record, batch_size, lengths=lengths, kind=kind,
    pack=pack, seed=seed, task_ids=per_task, cached=cache_dir is not None,
    row_ids=() if adapter is None else adapter.reads, choices=choices,
  )  # fmt: skip
  settings = {
    'model': models.describe(module),
    'optimizer': optim.describe(trainer.optimizer),
    'loss': dict(loss or {}),
    'initial_checkpoint': start.fingerprint(),
    **start.described(),
    **data,
    **described(
      objective, transforms, freeze, accumulate, clip, adapter=adapter,
      adapter_start=adapter_start,
    ),
  }  # fmt: skip
  where = same_run.layout(trainer.mesh)
  same_run.check(record, settings, where)
  cut = kind == 'encoder_decoder' and cache_dir is None
  tell(name, steps, batch_size, lengths if cut else {})
  key = jax.random.key(seed)
  given = begin.arguments(trainer, steps, key, directory / 'train')
  if adapter is not None:
    given = adapting.begun(family, adapter_start, given, key)
  same_run.write(record, settings, where)
  state = trainer.fit(
    stream, steps=steps, directory=directory / 'train', key=key, **given,
    local_rows=local_rows, save_every=save_every, log_every=log_every,
  )  # fmt: skip
  if adapter is None:
    checkpoints.export(directory / 'model', family, state.params)
  else:
    adapting.export(directory, family, state.params, start.checkpoint, names)


def objective_of(
  objective: objective_lib.Objective | None, loss: Mapping[str, Any] | None
) -> objective_lib.Objective:
  """The objective of a run, given itself or by options of cross entropy.

  Raises:
    ConfigError: both are given.
  """
  if objective is not None and loss:
    raise errors.ConfigError(
      'Both objective and loss are given: loss holds options of the usual '
      'objective, cross entropy. Leave one of them out.'
    )
  return objective or objective_lib.cross_entropy(**(loss or {}))


def described(
  objective: objective_lib.Objective | None,
  transforms: Sequence[transforms_lib.StepTransform],
  freeze: Sequence[str],
  accumulate: int,
  clip: float | None,
  **more: Any,
) -> dict[str, Any]:
  """What fixes a run besides what every run has, as plain data.

  Args:
    objective: of the run, if it is none of cross entropy's options.
    transforms: see `trainer.Trainer`.
    freeze: likewise.
    accumulate: likewise.
    clip: likewise.
    **more: what else it has, told by its text; None is not told.
  """
  found = {
    'objective': objective and _told(objective),
    'transforms': {each.name: dict(each.settings) for each in transforms},
    'freeze': list(freeze),
    'accumulate': None if accumulate == 1 else accumulate,
    'clip': clip,
    **{name: each and _told(each) for name, each in more.items()},
  }
  return {name: value for name, value in found.items() if value}


def _told(value):
  """A callable or an argument of one as text, the same in every process."""
  if isinstance(value, functools.partial):
    given = [_told(each) for each in value.args]
    given += [f'{n}={_told(each)}' for n, each in value.keywords.items()]
    return f'{_told(value.func)}({", ".join(given)})'
  text = getattr(value, '__qualname__', repr(value))
  # Objects that say nothing of themselves say where they lie in memory.
  return re.sub(r' at 0x[0-9a-f]+', '', text)


def tell(
  name: str, steps: int, batch_size: int, lengths: Mapping[str, int]
) -> None:
  """Prints what will be cut, and what a mixture draws; the first process does."""
  if jax.process_index() != 0:
    return
  if lengths:
    splits.tell_cuts(name, 'train', lengths)
  if name in seqio.MixtureRegistry.names():
    shares = mixtures.probabilities(name, steps=steps, batch_size=batch_size)
    if len(shares) > 1:
      print(f'{name}, of each row one example:', file=sys.stderr)
      print(mixtures.table(shares), file=sys.stderr)


def _open_data(trainer, provider, record, batch_size, **settings):
  """See `open_shared`; checked against the model and the mesh."""
  stream_lib.check_positive('batch size', batch_size)
  if batch_size % trainer.mesh.shape['data']:
    raise errors.ConfigError(
      f'A batch of {batch_size} rows does not divide over '
      f'{trainer.mesh.shape["data"]} data slices of the mesh.'
    )
  for feature in provider.output_features.values():
    check_vocabulary(feature.vocabulary, trainer.family.module)
  return open_shared(
    provider.name,
    trainer.mesh,
    shards=same_run.begun_with(record, 'shards', None),
    batch_size=batch_size,
    **settings,
  )


def open_shared(
  name: str,
  mesh: jax.sharding.Mesh,
  *,
  shards: int | None,
  batch_size: int,
  **settings: Any,
) -> tuple[streams.PartsStream, dict[str, Any], bool]:
  """Opens this process's share of the batches of a task or mixture.

  The examples stay divided as they were when the run began, whatever the number
  of processes is now: who has too few shards to share them out reads all.

  Args:
    name: a task or mixture.
    mesh: where its batches go.
    shards: into how many the examples were divided; None for a fresh run, which
      has one for every process that holds rows of its own.
    batch_size: rows over all processes.
    **settings: of `stream.SeqioStream`.

  Returns:
    `(stream, what fixes its batches, if it has own rows only)`.
  """
  index, readers = batches.data_shard(mesh)
  shards = shards or readers
  own, local_rows = share(shards, index, readers)
  parts = {
    i: stream_lib.SeqioStream(
      name,
      batch_size=batch_size // shards,
      shard_index=i,
      num_shards=shards,
      **settings,
    )
    for i in own
  }
  identity = dict(parts[own[0]].identity, batch_size=batch_size)
  del identity['shard']
  return streams.PartsStream(parts), {**identity, 'shards': shards}, local_rows


def share(shards: int, index: int, readers: int) -> tuple[range, bool]:
  """The shards that one of several readers opens.

  Returns:
    `(shards, True)` if readers share them out, in order; `(all of them, False)`
    if there are too few, or they do not divide.
  """
  if shards % readers:
    return range(shards), False
  each = shards // readers
  return range(index * each, (index + 1) * each), True


def check_vocabulary(vocabulary: seqio.Vocabulary, module: nn.Module) -> None:
  """Raises if a vocabulary has tokens for which the model has no row."""
  if module.config.vocab_size < vocabulary.vocab_size:
    raise errors.ConfigError(
      f'The vocabulary has {vocabulary.vocab_size} ids '
      f'({type(vocabulary).__name__}), the model only '
      f'{module.config.vocab_size}: set its vocab_size.'
    )


def optimizer_of(
  optimizer: optim.OptimizerLike, steps: int
) -> optax.GradientTransformation:
  """The optimizer of a run of `steps`; says if its schedule has others."""
  made = optim.of_run(optimizer, steps)
  settings = optim.describe(made)
  rate = settings['learning_rate'] if isinstance(settings, Mapping) else None
  length = rate.get('steps') if isinstance(rate, Mapping) else None
  if length is not None and length != steps and jax.process_index() == 0:
    print(
      f'The learning rate spans {length} steps, the run {steps}. Leave the '
      'steps of the schedule out, and it spans the run.',
      file=sys.stderr,
    )
  return made


def save_json(path: pathlib.Path, data: Any) -> None:
  """Writes a JSON file for people to read, whole or not at all."""
  with files_lib.atomic_path(path, overwrite=True) as temporary:
    temporary.write_text(json.dumps(data, indent=2) + '\n')
