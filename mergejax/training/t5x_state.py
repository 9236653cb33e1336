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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import t5x_writing
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import callbacks
from mergejax.training import factors as factors_lib
from mergejax.training import optim
from mergejax.training import state as state_lib

_ROW, _COLUMN, _FULL, _MOMENTUM = SLOTS = ('v_row', 'v_col', 'v', 'm')
# optax's names of ours.
_NAMES = {'v_row': _ROW, 'v_col': _COLUMN, 'v': _FULL, 'ema': _MOMENTUM}
_STATES = 'state/param_states/'


class _Slot(NamedTuple):
  """Where a number of a parameter lies in T5X's state, and how.

  Attributes:
    name: in T5X's state.
    shape: there; `(1,)` for one that is not in use.
    order: for each axis of ours, unfolded, its place there; None: not in use.
    unfolded: ours before axes were folded into rows and columns.
    own: our shape.
  """

  name: str
  shape: tuple[int, ...]
  order: tuple[int, ...] | None
  unfolded: tuple[int, ...]
  own: tuple[int, ...]


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
    for name in SLOTS
  }
  for place, (path, slot) in _slots(leaves, specs, optimizer).items():
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
  slots = _slots(leaves, specs, optimizer)
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


def _slots(leaves, specs, optimizer):
  """`{place in our state: (parameter, slot)}`; counts are left out."""
  settings = optim.describe(optimizer)
  if not isinstance(settings, Mapping) or settings['optimizer'] != 'adafactor':
    name = settings if isinstance(settings, str) else settings['optimizer']
    raise errors.ConfigError(
      f'The optimizer is {name}; states go to and from T5X of optim.adafactor '
      "alone. Start from the parameters: restore='params'."
    )
  specs = axes_lib.with_axes(specs, settings['axes'])
  ours = factors_lib.Factors(
    settings.get('logical_factor_rules'), settings.get('factor_map', ())
  )
  theirs = ours
  if ours == factors_lib.Factors():
    theirs = factors_lib.Factors(factors_lib.STANDARD)
  layouts = factors_lib.layouts(specs, ours)
  wanted = {}
  if settings.get('factored', True):
    wanted = factors_lib.layouts(specs, theirs)
  shapes = {}
  for place, leaf in leaves.items():
    path = state_lib.parameter_of(place, specs)
    if path is not None:
      before, _, after = f'/{place}/'.rpartition(f'/{path}/')
      parts = (*before.split('/'), *after.split('/'))
      name = next((_NAMES[part] for part in parts if part in _NAMES), None)
      if name is not None:
        shapes.setdefault(path, {})[name] = (place, tuple(leaf.shape))
  found = {}
  for path, of_path in shapes.items():
    layout = layouts.get(path, factors_lib.Layout(()))
    kept = _kept(path, specs[path].shape, of_path, layout, wanted.get(path))
    for name, (place, own) in of_path.items():
      found[place] = path, _slot(specs[path].shape, name, own, layout, kept)
  return found


def _kept(path, shape, of_path, layout, wanted):
  """`{our slot: (axes that ours keeps, T5X's slot)}` of a parameter."""
  stack = layout.stack
  rest = tuple(i for i in range(len(shape)) if i not in stack)
  everything = {
    _FULL: ((*stack, *rest), _FULL),
    _MOMENTUM: ((*stack, *rest), _MOMENTUM),
  }
  if layout.folds:
    rest = (*layout.rows, *layout.columns)
    everything = {name: ((*stack, *rest), name) for name in everything}
  lead = tuple(shape[i] for i in stack)
  factored = len(rest) > 1 and of_path[_FULL][1] == (*lead, 1)
  by_rule = wanted is not None and wanted.factored is not None
  if by_rule and wanted.factored != factored:
    raise errors.ConfigError(
      f'T5X {"factors" if wanted.factored else "does not factor"} {path} '
      f'{list(shape)}, whose layers are stacked, whatever its size; this '
      'Adafactor goes by the size of its slices. Set logical_factor_rules='
      'optim.standard_logical_factor_rules().'
    )
  if not factored:
    return everything
  if layout.folds:
    groups = [layout.rows, layout.columns]
  else:
    groups = [(i,) for i in rest]
  sizes = [int(np.prod([shape[i] for i in group])) for group in groups]
  *_, d1, d0 = np.argsort(sizes)
  keeps = {
    name: (*stack, *(i for n, g in enumerate(groups) if n != gone for i in g))
    for name, gone in ((_ROW, d0), (_COLUMN, d1))
  }
  # T5X's rows are what its columns are not, and the other way.
  rows, columns = (
    (wanted.rows, wanted.columns) if by_rule else (groups[d1], groups[d0])
  )
  names = {
    frozenset(range(len(shape))) - frozenset(columns): _ROW,
    frozenset(range(len(shape))) - frozenset(rows): _COLUMN,
  }
  for name, axes in keeps.items():
    everything[name] = axes, names.get(frozenset(axes), name)
  return {**everything, _FULL: None}


def _slot(shape, name, own, layout, kept):
  if kept.get(name) is None:
    return _Slot(name, (1,), None, own, own)
  axes, theirs = kept[name]
  there = sorted(axes)
  return _Slot(
    theirs,
    tuple(shape[i] for i in there),
    tuple(there.index(i) for i in axes),
    tuple(shape[i] for i in axes),
    own,
  )


def _has(leaf):
  return 'nothing' if leaf is None else list(np.shape(leaf))
