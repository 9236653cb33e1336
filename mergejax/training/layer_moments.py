# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""An optimizer's state for layers that lie in another way than its own.

Layers one by one have moments of their own; scanned, those of all layers lie in
one array. Of an optimizer that looks at numbers by themselves (AdamW) a moment
lies as its parameter does. Of Adafactor, which `slices` maps over stacked axes,
it lies with these in front, factored as the layer by itself is. Either way the
numbers are the same, and the way there and back changes no bit.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import layer_stacks
from mergejax.training import optim
from mergejax.training import slices
from mergejax.training import state as state_lib


class _Place(NamedTuple):
  """Where a leaf of a state lies.

  Attributes:
    kind: what it is, the same in both forms: `0/v_row`.
    path: of its parameter; None for what all of them share.
    in_front: its stacked axes are, whatever they are in the parameter.
  """

  kind: str
  path: typing.Path | None
  in_front: bool


class _Form:
  """A way in which layers lie, and the moments of an optimizer with them."""

  def __init__(
    self, specs: typing.SpecTree, optimizer: optax.GradientTransformation
  ):
    settings = optim.describe(optimizer)
    settings = settings if isinstance(settings, Mapping) else {}
    self.specs = axes_lib.with_axes(specs, settings.get('axes', ()))

  def place(self, place: str) -> _Place:
    """What a leaf of the state is."""
    path = state_lib.parameter_of(place, self.specs)
    parts, in_front = place.split('/'), False
    if path is not None:
      before, _, after = f'/{place}/'.rpartition(f'/{path}/')
      parts = [part for part in (before + '/' + after).split('/') if part]
      in_front = slices.STACKED in parts
    own = (slices.STACKED, slices.WHOLE)
    return _Place('/'.join(p for p in parts if p not in own), path, in_front)

  def layers(self, place: _Place) -> tuple[int, list[typing.Path]]:
    """The axis of layers, and the paths of these; one path where it is one."""
    spec = self.specs[place.path]
    axis, names = layer_stacks.apart(place.path, spec)
    if place.in_front and names != [place.path]:
      axis = axes_lib.stacked(spec).index(axis)
    return axis, names


def restack(
  moments: Any,
  there: tuple[typing.SpecTree, optax.GradientTransformation],
  like: Any,
  here: tuple[typing.SpecTree, optax.GradientTransformation],
) -> Any:
  """A state of an optimizer for the same model with its layers otherwise.

  Args:
    moments: the state, in host memory or on one process.
    there: parameters that it is of, with logical axes, and its optimizer.
    like: a state of the same optimizer, or its shapes, in the wanted form.
    here: likewise.

  Returns:
    A state like `like`, in host memory, of the same numbers.

  Raises:
    CheckpointError: moments of a stack are factored as those of its layers are
      not, by rules or by the size of an array.
  """
  form, wanted = _Form(*there), _Form(*here)
  shared, single = {}, {}
  for text, leaf in tree.flatten(moments).items():
    place = form.place(text)
    if place.path is None:
      shared[place.kind] = np.asarray(leaf)
      continue
    for name, part in _layers(form, place, np.asarray(leaf)):
      single[place.kind, name] = part
  wrong = []

  def value(text, leaf):
    place = wanted.place(text)
    if place.path is None:
      found = shared.get(place.kind)
    else:
      axis, names = wanted.layers(place)
      # What a stack counts for each of its layers others count for all.
      count = shared.get(place.kind)
      parts = [single.get((place.kind, name), count) for name in names]
      found = _joined(parts, None if names == [place.path] else axis)
    if found is None or found.shape != tuple(leaf.shape):
      given = 'nothing' if found is None else list(found.shape)
      wrong.append(f'{text}: {given} there, {list(leaf.shape)} here')
      return leaf
    return found.astype(leaf.dtype)

  result = tree.map_paths(value, like)
  if wrong:
    raise errors.CheckpointError(
      'The layers of the checkpoint are scanned and those of the model are not, '
      'or the other way, and these moments are not the same for both:\n'
      f'{errors.listed(wrong)}\nRules (logical_factor_rules, factor_map) factor '
      'a stack whatever the size of its layers, and single layers by size '
      '(min_dim_size_to_factor). Set scan_layers as it was there, or start '
      "from the parameters alone: restore='params'."
    )
  return result


def _layers(
  form: _Form, place: _Place, leaf: np.ndarray
) -> Iterator[tuple[typing.Path, np.ndarray]]:
  """`(path, its part)` of every layer of a leaf."""
  axis, names = form.layers(place)
  if names == [place.path]:
    yield place.path, leaf
    return
  for i, name in enumerate(names):
    yield name, np.take(leaf, i, axis)


def _joined(
  parts: list[np.ndarray | None], axis: int | None
) -> np.ndarray | None:
  """The leaf of a parameter from those of its layers; None without one."""
  found = [part for part in parts if part is not None]
  if len(found) < len(parts) or len({part.shape for part in found}) != 1:
    return None
  return found[0] if axis is None else np.stack(found, axis)
