# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adafactor's state as T5X has it, and as optax and `slices` have it.

T5X keeps `v_row, v_col, v, m` of every parameter, with the parameter's own
order of axes, and zeros of shape `[1]` where one is not in use. optax keeps
trees of them, and a stack lies with its stacked axes first. Both hold the same
numbers, so the way there and back changes no bit.
"""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import t5x_writing
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import callbacks
from mergejax.training import state as state_lib
from mergejax.training import t5x_slots

_STATES = 'state/param_states/'


def to_t5x(
  opt_state: Any,
  specs: typing.SpecTree,
  optimizer: optax.GradientTransformation,
) -> dict[typing.Path, np.ndarray]:
  """The optimizer's state by T5X's names.

  Args:
    opt_state: of `optim.adafactor`, in host memory or on one process.
    specs: of the parameters, with logical axes.
    optimizer: whose state it is.

  Returns:
    `{'PARAMETER/v_row': array, ...}` with `v_col`, `v`, `m` likewise.

  Raises:
    ConfigError: another optimizer's; a stack that T5X factors in another way.
  """
  leaves = tree.flatten(opt_state)
  found = {
    f'{path}/{name}': np.zeros((1,), np.float32)
    for path in specs
    for name in t5x_slots.NAMES
  }
  for place, (path, slot) in t5x_slots.slots(leaves, specs, optimizer).items():
    if slot.order is not None:
      leaf = np.asarray(leaves[place]).reshape(slot.unfolded)
      back = np.argsort(slot.order)
      found[f'{path}/{slot.name}'] = np.transpose(leaf, back)
  return found


def from_t5x(
  moments: Mapping[typing.Path, Any],
  step: int,
  like: Any,
  specs: typing.SpecTree,
  optimizer: optax.GradientTransformation,
) -> Any:
  """The optimizer's state from T5X's; the inverse of `to_t5x`.

  Args:
    moments: `{'PARAMETER/v_row': array, ...}`.
    step: updates made, of which optax keeps counts.
    like: the optimizer's state, or its shapes.
    specs: of the parameters, with logical axes.
    optimizer: whose state it becomes.

  Returns:
    A state like `like`, in host memory.

  Raises:
    ConfigError: another optimizer's state; a stack that T5X factors otherwise.
    CheckpointError: a moment that is missing or of another shape: Adafactor
      was set otherwise there.
  """
  leaves = tree.flatten(like)
  slots = t5x_slots.slots(leaves, specs, optimizer)
  wanted = {f'{path}/{slot.name}': slot for path, slot in slots.values()}
  wrong = [
    f'{name}: {_has(moments.get(name))} there, {list(slot.shape)} here'
    for name, slot in wanted.items()
    if name not in moments or tuple(np.shape(moments[name])) != slot.shape
  ]
  wrong += [
    f'{name}: {_has(leaf)} there, not kept here'
    for name, leaf in moments.items()
    if name not in wanted and tuple(np.shape(leaf)) != (1,)
  ]
  if wrong:
    raise errors.CheckpointError(
      'The moments of the checkpoint are not those that this Adafactor keeps:\n'
      f'{errors.listed(wrong)}\nSet it as it was set there '
      '(min_dim_size_to_factor, factored, momentum; logical_factor_rules for '
      "scanned layers), or start from the parameters alone: restore='params'."
    )

  def value(place, leaf):
    if place not in slots:  # a count
      return np.full(leaf.shape, step, leaf.dtype)
    path, slot = slots[place]
    if slot.order is None:
      return np.zeros(leaf.shape, leaf.dtype)
    given = np.asarray(moments[f'{path}/{slot.name}'], leaf.dtype)
    return np.transpose(given, slot.order).reshape(slot.own)

  return tree.map_paths(value, like)


def restore(
  store: store_base.ParamStore,
  begin: state_lib.TrainState,
  specs: typing.SpecTree,
  optimizer: optax.GradientTransformation,
) -> state_lib.TrainState:
  """A state that goes on where T5X stopped: its moments, its step number.

  Args:
    store: from `checkpoint.open_state`.
    begin: a state of step 0 with the parameters, loaded from there.
    specs: of the parameters, with logical axes.
    optimizer: of the run, from `optim.adafactor`; one that knows the model's
      stacked parameters.

  Returns:
    The state, for `Trainer.fit(state=...)`.

  Raises:
    UserError: see `from_t5x`; the checkpoint has no moments, or parameters are
      frozen here.
  """
  stored = store.specs()
  names = [name for name in stored if name.startswith(_STATES)]
  if 'state/step' not in stored or not names:
    raise errors.CheckpointError(
      f'{store.name} holds no state of an optimizer as T5X has it '
      '(state/step, state/param_states/...): start from its parameters alone, '
      "restore='params'."
    )
  leaves = tree.flatten(store.read([*names, 'state/step']))
  step = int(leaves.pop('state/step'))
  moments = {name.removeprefix(_STATES): leaf for name, leaf in leaves.items()}
  _check_all_learn(begin.opt_state, specs)
  opt_state = from_t5x(moments, step, begin.opt_state, specs, optimizer)
  return begin.replace(step=np.int32(step), opt_state=opt_state)


def save(
  path: os.PathLike | str,
  model: nn.Module | models.ModelFamily,
  optimizer: optax.GradientTransformation,
  state: state_lib.TrainState,
  *,
  overwrite: bool = False,
) -> pathlib.Path:
  """Saves a state as a checkpoint that T5X continues from.

  Args:
    path: a folder of checkpoints, `checkpoint_STEP` is made in it.
    model: whose state it is.
    optimizer: from `optim.adafactor`.
    state: parameters, moments and step number, of one model.
    overwrite: replace a checkpoint of that step.

  Returns:
    The checkpoint.

  Raises:
    UserError: see `to_t5x`; frozen parameters, of which there are no moments;
      the checkpoint exists, or the disk is full.
  """
  step = state_lib.step_number(state)
  target = pathlib.Path(path).expanduser() / f'checkpoint_{step}'
  specs = models.family_of(model).specs()
  _check_all_learn(state.opt_state, specs)
  if jax.process_count() > 1:
    state = partition.to_host(state)
  moments = to_t5x(state.opt_state, specs, optimizer)
  if jax.process_index() == 0:
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(target, overwrite=overwrite) as temporary:
      params = tree.flatten(state.params)
      t5x_writing.write(temporary, params, step, moments)
  return target


class save_t5x(callbacks.Callback):  # pylint: disable=invalid-name
  """Beside every checkpoint of a run, one that T5X continues from.

  They lie in the run's folder, `t5x/checkpoint_STEP`, or in `path`, and all of
  them stay.
  """

  everywhere = True

  def __init__(self, path: os.PathLike | str | None = None):
    self._path = path
    self._run: Any = None

  def on_start(self, run):
    if run.experts is not None:
      raise errors.ConfigError(
        'save_t5x: T5X trains one model; the state of experts that train side '
        'by side is none of its.'
      )
    self._path = self._path or run.folder('save_t5x') / 't5x'
    self._run = run

  def on_save(self, step, state):
    family, optimizer = self._run.family, self._run.optimizer
    save(self._path, family, optimizer, state, overwrite=True)


def _check_all_learn(opt_state, specs):
  """Raises for parameters that have no moments."""
  leaves = tree.flatten(opt_state)
  have = {state_lib.parameter_of(place, specs) for place in leaves}
  frozen = [path for path in specs if path not in have]
  if frozen:
    raise errors.ConfigError(
      f'{errors.some(frozen)} are frozen (freeze=) and have no moments, which '
      'T5X keeps of every parameter: its states are of runs that freeze '
      'nothing.'
    )


def _has(leaf):
  return 'nothing' if leaf is None else list(np.shape(leaf))
