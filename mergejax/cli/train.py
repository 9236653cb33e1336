# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train --gin_file=... --gin.NAME=VALUE`: what a gin file describes.

A gin file names a job, a function of this package or of the user's, and binds
its arguments: `train.run.job = @branch_train_merge.run`.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import optax
import seqio

import gin
from mergejax import architectures
from mergejax import models
from mergejax import partition
from mergejax.checkpoints import base
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.cli import same_run
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.data import stream as stream_lib
from mergejax.evaluation import summaries
from mergejax.experts import branch
from mergejax.statistics import saved
from mergejax.training import batches
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import hooks as hooks_lib
from mergejax.training import loop
from mergejax.training import losses
from mergejax.training import optim
from mergejax.training import step as step_lib
from mergejax.training import streams


def run(job: Callable[[], Any]) -> None:
  """Runs the job that a gin file binds."""
  job()


def main(arguments: Sequence[str]) -> None:
  """Parses T5X's flags and runs the job."""
  files, paths, bindings, rest = common.split_gin_flags(arguments)
  parser = common.parser('train', 'Train what gin files describe.')
  parser.add_argument(
    '--gin_file',
    action='append',
    help='a gin file; later ones add to and override earlier ones',
  )
  parser.add_argument('--gin_search_paths', help='folders, comma-separated')
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help='print the complete configuration, train nothing',
  )
  parser.add_argument(
    '--multiprocess',
    action='store_true',
    help='join the processes that the environment tells of (a TPU pod, Slurm)',
  )
  parser.add_argument(
    '--coordinator_address', help='host:port, to join by hand'
  )
  parser.add_argument('--process_count', type=int)
  parser.add_argument('--process_index', type=int)
  options = parser.parse_args(rest)
  if not files:
    raise errors.ConfigError('mergejax train needs --gin_file=FILE.')
  common.parse_gin(files, bindings, paths)
  if options.dry_run:
    print(gin.config_str())
    return
  if options.multiprocess or options.coordinator_address:
    partition.join_processes(
      options.coordinator_address, options.process_count, options.process_index
    )
  gin.get_configurable(run)()


def fit_phase(
  *,
  phase: str,
  module: nn.Module,
  optimizer: optax.GradientTransformation,
  state: step_lib.TrainState,
  stream: loop.Stream,
  mesh: jax.sharding.Mesh,
  steps: int,
  directory: pathlib.Path,
  loss: Mapping[str, Any] | None = None,
  experts: Sequence[str] | None = None,
  local_rows: bool = False,
  save_every: int = 1000,
  log_every: int = 10,
) -> step_lib.TrainState:
  """Trains one phase with its checkpoints, progress, JSONL and TensorBoard.

  Args:
    phase: its name, for folders and the progress bar.
    module: the model.
    optimizer: its optimizer.
    state: where to begin; with a leading axis if `experts` is given.
    stream: the data of this process.
    mesh: where to run.
    steps: the step number to reach.
    directory: holds `PHASE/checkpoints`, `PHASE/metrics.jsonl`, `PHASE/events`.
    loss: options of `losses.make_loss`.
    experts: names of the experts, if these are trained side by side.
    local_rows: see `branch.batch_placer`.
    save_every: steps between checkpoints.
    log_every: steps between logged metrics.

  Returns:
    The trained state, on the mesh.
  """
  stacked = experts is not None
  check = batches.checker(module, str(stream), stacked=stacked)
  placer = branch.batch_placer(mesh, stacked=stacked, local_rows=local_rows)
  dropout = getattr(module.config, 'dropout_rate', 0.0) > 0
  step_fn = step_lib.make_step(
    losses.make_loss(module, **(loss or {})), optimizer, dropout=dropout
  )
  state = branch.place_state(mesh, state, stacked=stacked)
  folder = directory / phase
  checkpoints = checkpoints_lib.Checkpoints(folder / 'checkpoints')
  hooks = []
  if jax.process_index() == 0:
    hooks = [
      hooks_lib.progress(phase, steps),
      hooks_lib.jsonl(folder / 'metrics.jsonl', experts),
      summaries.tensorboard(folder / 'events', experts),
    ]
  try:
    return loop.fit(
      branch.compile_step(step_fn, mesh, state, stacked=stacked),
      state,
      stream,
      steps=steps,
      checkpoints=checkpoints,
      save_every=save_every,
      log_every=log_every,
      hooks=hooks,
      place=lambda batch: placer(check(batch)),
    )
  finally:
    checkpoints.close()


def train_model(
  *,
  module: nn.Module,
  optimizer: (
    optax.GradientTransformation | Callable[..., optax.GradientTransformation]
  ),
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
  log_every: int = 10,
  loss: Mapping[str, Any] | None = None,
  mesh: Mapping[str, int] | None = None,
) -> None:
  """The job that trains one model on one task or mixture.

  Args:
    module: a T5 or a language model.
    optimizer: from `train.optim`; a function such as `optim.adafactor` is
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
    initial_checkpoint: parameters to start from; fresh ones by default.
    log_every: steps between logged metrics.
    loss: options of `losses.make_loss`.
    mesh: sizes for `partition.make_mesh`.
  """
  directory = pathlib.Path(model_dir)
  record = directory / 'run.json'
  if initial_checkpoint is not None:
    _check_initial(module, initial_checkpoint)
  optimizer = optimizer_of(optimizer, steps)
  the_mesh = partition.make_mesh(**(mesh or {}))
  stream_lib.check_positive('batch size', batch_size)
  if batch_size % the_mesh.shape['data']:
    raise errors.ConfigError(
      f'A batch of {batch_size} rows does not divide over '
      f'{the_mesh.shape["data"]} data slices of the mesh.'
    )
  name = getattr(mixture_or_task, 'name', mixture_or_task)
  for feature in stream_lib.find(name, 'train').output_features.values():
    check_vocabulary(feature.vocabulary, module)
  stream, data, local_rows = open_shared(
    name,
    the_mesh,
    shards=same_run.begun_with(record, 'shards', None),
    batch_size=batch_size,
    lengths=lengths,
    kind=kind,
    pack=pack,
    seed=seed,
  )
  settings = {
    'model': models.describe(module),
    'optimizer': optim.describe(optimizer),
    'loss': dict(loss or {}),
    'initial_checkpoint': initial_checkpoint
    and saved.fingerprint(checkpoint.open_checkpoint(initial_checkpoint)),
    **data,
  }
  same_run.check(record, settings, same_run.layout(the_mesh))
  if kind == 'encoder_decoder' and jax.process_index() == 0:
    stream_lib.tell_cuts(name, 'train', lengths)
  key = jax.random.key(seed)
  if initial_checkpoint is None:
    params = models.init_params(module, key)
  else:
    _, params = models.load_model(initial_checkpoint)
  same_run.write(record, settings, same_run.layout(the_mesh))
  state = fit_phase(
    phase='train',
    module=module,
    optimizer=optimizer,
    state=step_lib.create(params, optimizer, key),
    stream=stream,
    mesh=the_mesh,
    local_rows=local_rows,
    steps=steps,
    directory=directory,
    loss=loss,
    save_every=save_every,
    log_every=log_every,
  )
  save_model(directory / 'model', module, state.params)


def _check_initial(module, path):
  """Raises unless a checkpoint computes what the module does; reads no weight."""
  loaded = models.load_module(path)
  configured = 'the configured module'
  architectures.check(
    {configured: models.describe(module), str(path): models.describe(loaded)},
    'Configure the module as the checkpoint was trained.',
  )
  tree_lib.check_same(
    models.param_specs(module), models.param_specs(loaded),
    expected_name=configured, given_name=str(path),
  )  # fmt: skip


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
  index, readers = branch.data_shard(mesh)
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
  optimizer: (
    optax.GradientTransformation | Callable[..., optax.GradientTransformation]
  ),
  steps: int,
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


def save_model(path: pathlib.Path, module: nn.Module, params: Any) -> None:
  """Saves parameters with the module's `config.json`, replacing older ones."""
  params = partition.to_host(params)
  if jax.process_index() == 0:
    checkpoint.save_checkpoint(
      path, params, config=models.describe(module), overwrite=True
    )


def save_json(path: pathlib.Path, data: Any) -> None:
  """Writes a JSON file for people to read, whole or not at all."""
  with base.atomic_path(path, overwrite=True) as temporary:
    temporary.write_text(json.dumps(data, indent=2) + '\n')
