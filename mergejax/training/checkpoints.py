# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: the training state and the position in the data.

Orbax writes a step under a temporary name and renames it when all of it is on
disk, so a run that is killed never leaves a half-written step that counts.
"""

import dataclasses
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import state as state_lib


@dataclasses.dataclass
class _BytesSave(ocp.args.CheckpointArgs):
  content: bytes


@dataclasses.dataclass
class _BytesRestore(ocp.args.CheckpointArgs):
  pass


class _BytesHandler(ocp.CheckpointHandler):
  """One file a process: where it is in its own data. All of them are read."""

  def save(self, directory, args):
    file = pathlib.Path(directory) / f'process_{jax.process_index()}'
    file.write_bytes(args.content)

  def restore(self, directory, args):
    del args
    files = pathlib.Path(directory).glob('process_*')
    return [
      file.read_bytes()
      for file in sorted(files, key=lambda f: int(f.name.rpartition('_')[2]))
    ]


ocp.args.register_with_handler(_BytesHandler, for_save=True)(_BytesSave)
ocp.args.register_with_handler(_BytesHandler, for_restore=True)(_BytesRestore)


class Checkpoints:
  """The checkpoints of one run, newest last."""

  def __init__(self, directory: os.PathLike | str, *, keep: int = 2):
    """Opens (and creates) a folder of checkpoints.

    Args:
      directory: holds one folder a step.
      keep: how many of the newest steps stay on disk.
    """
    self._directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        # Folders that the first process makes meanwhile are told of by a key
        # which a run of several phases has used before: others would write
        # into what is not there yet.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
      item_handlers={
        'state': ocp.StandardCheckpointHandler(),
        'data': _BytesHandler(),
      },
    )

  def latest(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def save(self, state: state_lib.TrainState, data: bytes) -> None:
    """Saves a step; returns once the state may change, writes meanwhile.

    Args:
      state: saved under its own step number; a step already saved is left.
      data: the position in the data, from `Stream.state()`.

    Raises:
      UserError: this or the previous write failed (a full disk, say). Earlier
        steps are untouched.
    """
    step = state_lib.step_number(state)
    if step == self.latest():
      return
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_stored(state)), data=_BytesSave(data)
        ),
      )

  def restore(
    self, like: state_lib.TrainState
  ) -> tuple[state_lib.TrainState, list[bytes]]:
    """Restores the newest step.

    Args:
      like: a state, or shapes, with the wanted structure and shardings; each
        device reads its shards, whatever the mesh was that saved them.

    Returns:
      `(state, positions in the data)`, one of each process that saved.

    Raises:
      UserError: the step does not fit `like`: another model or optimizer.
    """
    step = self.latest()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _stored(like))
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract), data=_BytesRestore()
        ),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise errors.ConfigError(
        f'Step {step} in {self._directory} does not fit this run '
        f'({errors.first_line(error)}). It was made by another model, '
        'optimizer, step transforms or number of experts: choose another folder, or remove it.'
      ) from error
    return state_lib.TrainState(**restored['state']), restored['data']

  def wait(self) -> None:
    """Returns when everything is on disk; raises if a write failed."""
    with self._writing():
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits and lets go of the folder."""
    self.wait()
    self._manager.close()

  def _writing(self):
    return _WriteErrors(self._directory)


def has_steps(directory: os.PathLike | str) -> bool:
  """Whether a folder of `Checkpoints` holds a step, so that a run goes on."""
  folder = pathlib.Path(directory)
  # A step that is being written has a longer name.
  return folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir())


def continued(
  store: store_base.ParamStore, begin: state_lib.TrainState
) -> state_lib.TrainState:
  """A state with the moments and the step number of another run of ours.

  Args:
    store: from `checkpoint.open_state`: a step of that run.
    begin: a state of step 0 with the parameters of that step.

  Raises:
    StructureError: the moments are those of another optimizer or model.
  """
  prefix = 'opt_state/'
  names = [name for name in store.specs() if name.startswith(prefix)]
  leaves = tree.flatten(store.read([*names, 'step']))
  moments = {name.removeprefix(prefix): leaves[name] for name in names}
  tree.check_same(
    tree.specs(begin.opt_state), tree.specs(moments),
    expected_name="this run's optimizer", given_name=store.name,
  )  # fmt: skip
  opt_state = tree.map_paths(lambda path, _: moments[path], begin.opt_state)
  return begin.replace(step=np.int32(leaves['step']), opt_state=opt_state)


def _stored(state):
  """A state as it lies on the disk: without extras where there are none."""
  fields = dict(vars(state))
  if not fields['extras']:
    del fields['extras']
  return fields


def export(
  path: os.PathLike | str, model: models.ModelFamily, params: typing.Tree
) -> None:
  """Saves parameters as a model, with its `config.json`, replacing an older one.

  Arrays of one process are written from their shards; those that are spread
  over processes are fetched, and the first process writes them.

  Args:
    path: a folder.
    model: the family of the model; one that cannot be described is saved
      without `config.json`.
    params: its parameters.
  """
  family = models.family_of(model)
  config = None
  if family.config_class is not None:
    config = models.describe(family)
  if jax.process_count() > 1:
    params = partition.to_host(params)
  if jax.process_index() == 0:
    checkpoint.save_checkpoint(path, params, config=config, overwrite=True)


class _WriteErrors:
  """Turns a failed write, whatever library wrapped it, into one message."""

  def __init__(self, directory):
    self._directory = directory

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if isinstance(error, Exception) and files_lib.is_write_failure(error):
      raise errors.ConfigError(
        f'Could not save to {self._directory}: '
        f'{files_lib.write_failure_reason(error)}. Earlier checkpoints there are '
        'untouched; free some space and run the same command to continue '
        'from the newest.'
      ) from error
    return False
