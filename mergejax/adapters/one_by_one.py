# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A base by its layers one by one, whether they are scanned or not."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import layer_stacks


def specs(base: typing.SpecTree) -> typing.SpecTree:
  """Specs of a base, those of a scanned stack as they are of its layers.

  Args:
    base: specs, with axes; a parameter that names no axis of layers stays.

  Example:
    >>> spec = typing.LeafSpec((3, 2), 'float32', ('embed', 'layers'))
    >>> found = specs({'decoder/decoder/pre_mlp_layer_norm/scale': spec})
    >>> {path: (spec.shape, spec.axes) for path, spec in found.items()}
    {'decoder/layers_0/pre_mlp_layer_norm/scale': ((3,), ('embed',)), \
'decoder/layers_1/pre_mlp_layer_norm/scale': ((3,), ('embed',))}
  """
  found = {}
  for path, spec in base.items():
    axis, layers = _apart(path, spec)
    if axis is not None:
      shape, axes = list(spec.shape), list(spec.axes or ())
      del shape[axis], axes[axis]
      spec = dataclasses.replace(spec, shape=tuple(shape), axes=tuple(axes))
    found |= dict.fromkeys(layers, spec)
  return found


def leaves(
  base: typing.SpecTree, params: Mapping[str, Any]
) -> dict[typing.Path, Any]:
  """`{path: array}` of a base's parameters, by the names of `specs(base)`.

  Args:
    base: specs of the parameters.
    params: a tree of such leaves; what `base` does not name stays.
  """
  found = {}
  for path, leaf in tree.flatten(params).items():
    axis, layers = _apart(path, base.get(path))
    for i, layer in enumerate(layers):
      place = () if axis is None else (slice(None),) * axis + (i,)
      found[layer] = leaf[place] if place else leaf
  return found


def _apart(path, spec):
  """`(axis of layers or None, paths of the layers)` of a parameter."""
  if spec is None or 'layers' not in (spec.axes or ()):
    return None, [path]
  axis, layers = layer_stacks.apart(path, spec)
  return (None if layers == [path] else axis), layers
