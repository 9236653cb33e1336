# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where each of Adafactor's moments lies in T5X's state, and in ours.

T5X keeps `v_row, v_col, v, m` of every parameter, with the parameter's own
order of axes, and zeros of shape `[1]` where one is not in use. optax keeps
trees of them, and a stack lies with its stacked axes first.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import factors as factors_lib
from mergejax.training import optim
from mergejax.training import state as state_lib

_ROW, _COLUMN, _FULL, _MOMENTUM = NAMES = ('v_row', 'v_col', 'v', 'm')
# optax's names of ours.
_OPTAX = {'v_row': _ROW, 'v_col': _COLUMN, 'v': _FULL, 'ema': _MOMENTUM}


class Slot(NamedTuple):
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


def slots(
  leaves: Mapping[str, Any],
  specs: typing.SpecTree,
  optimizer: optax.GradientTransformation,
) -> dict[str, tuple[typing.Path, Slot]]:
  """The slots of a state.

  Args:
    leaves: `{place: array or shape}` of our state.
    specs: of the parameters, with logical axes.
    optimizer: whose state it is.

  Returns:
    `{place: (parameter, slot)}`; counts of steps are left out.

  Raises:
    ConfigError: not the state of `optim.adafactor`; a stack that T5X factors
      and ours does not, or the other way.
  """
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
      name = next((_OPTAX[part] for part in parts if part in _OPTAX), None)
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
    return Slot(name, (1,), None, own, own)
  axes, theirs = kept[name]
  there = sorted(axes)
  return Slot(
    theirs,
    tuple(shape[i] for i in there),
    tuple(there.index(i) for i in axes),
    tuple(shape[i] for i in axes),
    own,
  )
