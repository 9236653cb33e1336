# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5's layers one by one, or scanned: one model, stored in two ways.

One by one, `encoder/layers_3/mlp/wi/kernel` is `[embed, mlp]`; scanned,
`encoder/encoder/mlp/wi/kernel` is `[embed, layers, mlp]` or has its layers on
another axis (`nn.stack`). The table of relative positions is one for a stack,
`encoder/relpos_bias`, or one for every layer.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import stacks
from mergejax.core import typing
from mergejax.nn import transformer

_STACK = re.compile(r'(encoder|decoder)/\1/(.*)')
_LAYER = re.compile(r'(encoder|decoder)/layers_(\d+)/(.*)')
# Stacked axes that are those of layers; experts of a layer are its own.
_LAYERS = tuple(
  n for n in stacks.NAMES if not n.startswith(('expert', 'branch'))
)
_TABLE = 'relpos_bias/rel_embedding'


def restack(
  leaves: Mapping[typing.Path, Any],
  config: transformer.StackConfig,
  axes: Mapping[typing.Path, tuple[str, ...]] | None = None,
) -> dict[typing.Path, Any]:
  """Parameters in the form that a configuration asks for.

  Args:
    leaves: `{path: array}` in either form.
    config: whose `scan_layers`, `param_scan_axis` and `relative_per_layer` say
      the form wanted.
    axes: logical axes of the given leaves, where they are known: of stacks that
      name none, the axis is the one along which all are of one size.

  Returns:
    `{path: array}` of the same numbers, bit for bit.

  Raises:
    StructureError: where the layers of a stack lie is not known; tables of
      relative positions that differ by layer, for a model that has but one.

  Example:
    >>> apart = {f'encoder/layers_{i}/mlp/wi/kernel': np.full((2, 3), i)
    ...          for i in range(4)}
    >>> config = transformer.StackConfig(vocab_size=8, scan_layers=True)
    >>> found = restack(apart, config)
    >>> {path: leaf.shape for path, leaf in found.items()}
    {'encoder/encoder/mlp/wi/kernel': (2, 4, 3)}
  """
  found = _one_by_one(leaves, axes or {})
  found = _own_tables(found) if config.relative_per_layer else _shared(found)
  return (
    _scanned(found, config.param_scan_axis) if config.scan_layers else found
  )


def in_form(specs: typing.SpecTree, config: transformer.StackConfig) -> bool:
  """Whether parameters lie as a configuration asks for, as far as one sees.

  Args:
    specs: of the parameters, in either form, with axes where they are known.
    config: see `restack`.
  """
  for path, spec in specs.items():
    match = _STACK.fullmatch(path) or _LAYER.fullmatch(path)
    if match is None:
      # A table for a whole stack.
      if config.relative_per_layer and path.endswith(f'coder/{_TABLE}'):
        return False
      continue
    scanned = _STACK.fullmatch(path) is not None
    if scanned != config.scan_layers:
      return False
    if match[match.lastindex] == _TABLE and not config.relative_per_layer:
      return False
    at = [i for i, name in enumerate(spec.axes or ()) if name in _LAYERS]
    if scanned and at and at != [config.param_scan_axis]:
      return False
  return True


def apart(
  path: typing.Path, spec: typing.LeafSpec
) -> tuple[int, list[typing.Path]]:
  """A parameter in its layers: where it has their axis, and their own paths.

  Args:
    path: of the parameter.
    spec: with its logical axes.

  Returns:
    `(axis, paths)`; of one that stacks no layers, the path itself alone.

  Example:
    >>> spec = typing.LeafSpec((3, 2), 'float32', ('embed', 'layers'))
    >>> apart('encoder/encoder/encoder_norm/scale', spec)
    (1, ['encoder/layers_0/encoder_norm/scale', \
'encoder/layers_1/encoder_norm/scale'])
  """
  match = _STACK.fullmatch(path)
  if match is None:
    return 0, [path]
  name, rest = match.groups()
  axis = spec.axes.index('layers')
  return axis, [f'{name}/layers_{i}/{rest}' for i in range(spec.shape[axis])]


def form_of(
  specs: typing.SpecTree, config: transformer.StackConfig
) -> transformer.StackConfig:
  """The configuration of the same model whose parameters lie as the given ones.

  Args:
    specs: of parameters in either form, with axes where they are known.
    config: of the model.

  Raises:
    StructureError: where the layers of a stack lie is not known.
  """
  names = {match[1] for match in map(_STACK.fullmatch, specs) if match}
  axes = {path: spec.axes for path, spec in specs.items() if spec.axes}
  at = {_axis(name, specs, axes) for name in names}
  if len(at) > 1:
    raise errors.StructureError(
      f'{" and ".join(sorted(names))} stack their layers along different axes, '
      'which no model here does.'
    )
  tables = [p for p in specs if p.endswith(_TABLE)]
  return dataclasses.replace(
    config,
    scan_layers=bool(names),
    param_scan_axis=at.pop() if at else config.param_scan_axis,
    relative_per_layer=any(
      _STACK.fullmatch(p) or _LAYER.fullmatch(p) for p in tables
    ),
  )


def _one_by_one(leaves, axes):
  """Every stack in its layers."""
  found, at = {}, {}
  for path, leaf in leaves.items():
    match = _STACK.fullmatch(path)
    if match is None:
      found[path] = leaf
      continue
    name, rest = match.groups()
    if name not in at:
      at[name] = _axis(name, leaves, axes)
    for i in range(leaf.shape[at[name]]):
      place = (slice(None),) * at[name] + (i,)
      found[f'{name}/layers_{i}/{rest}'] = leaf[place]
  return found


def _axis(name, leaves, axes):
  """Where the parameters of a stack have their axis of layers."""
  paths = [path for path in leaves if path.startswith(f'{name}/{name}/')]
  told = {
    names.index(each)
    for names in (axes.get(path) or () for path in paths)
    for each in names
    if each in _LAYERS
  }
  fits = [
    axis
    for axis in range(min(len(leaves[path].shape) for path in paths))
    if len({leaves[path].shape[axis] for path in paths}) == 1
  ]
  found = sorted(told) or fits
  if len(found) != 1 or found[0] not in fits:
    raise errors.StructureError(
      f'{name}/{name} stacks layers, but along which axis is not known: '
      f'{"none" if not found else " or ".join(map(str, found))} would fit '
      f'{paths[0]} {list(leaves[paths[0]].shape)} and the others. Save the '
      'checkpoint with its axes (`axes=` of save_checkpoint).'
    )
  return found[0]


def _layers(leaves):
  """`{(stack, the rest of the path): {layer: array}}`."""
  found: dict[tuple[str, str], dict[int, Any]] = {}
  for path, leaf in leaves.items():
    match = _LAYER.fullmatch(path)
    if match is not None:
      of_layer = found.setdefault((match[1], match[3]), {})
      of_layer[int(match[2])] = leaf
  return found


def _own_tables(leaves):
  """A table of relative positions for every layer."""
  found = dict(leaves)
  for (name, _), of_layer in _layers(leaves).items():
    table = found.pop(f'{name}/{_TABLE}', None)
    if table is not None:
      found |= {f'{name}/layers_{i}/{_TABLE}': table for i in of_layer}
  return found


def _shared(leaves):
  """One table of relative positions for a stack."""
  found = dict(leaves)
  for (name, rest), of_layer in _layers(leaves).items():
    if rest != _TABLE:
      continue
    table, *others = of_layer.values()
    if not all(np.array_equal(table, other) for other in others):
      raise errors.StructureError(
        f'Every layer of the {name} has a table of relative positions of its '
        'own, and they differ: configure the model with '
        'relative_per_layer=True (at Hugging Face that is umT5: hf-umt5).'
      )
    found[f'{name}/{_TABLE}'] = table
    for i in of_layer:
      del found[f'{name}/layers_{i}/{_TABLE}']
  return found


def _scanned(leaves, axis):
  """Every stack as one."""
  found = {p: leaf for p, leaf in leaves.items() if not _LAYER.fullmatch(p)}
  for (name, rest), of_layer in _layers(leaves).items():
    layers = [of_layer[i] for i in sorted(of_layer)]
    stack = jnp.stack if isinstance(layers[0], jax.Array) else np.stack
    found[f'{name}/{name}/{rest}'] = stack(layers, axis)
  return found
