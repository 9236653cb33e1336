# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is a row and what is a column of a factored second moment.

Sizes decide for a matrix. Of more axes, and of stacks of matrices, rules over
logical axes decide, as in T5X: `embed` is a row, `mlp` a column.
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import jax.numpy as jnp

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

# What an axis is to a factored second moment; stacked axes are neither.
ROW, COLUMN, BATCH, NONE = 'row', 'column', 'batch', 'none'
PARTS = (ROW, COLUMN, BATCH, NONE)


# T5X's for its own layers (`standard_logical_factor_rules`), and for experts.
STANDARD: Mapping[str, str] = {
  'vocab': COLUMN,
  'embed': ROW,
  'mlp': COLUMN,
  'mlp_embed': ROW,
  'expert_mlp': COLUMN,
  'unmodeled': COLUMN,
  'heads': COLUMN,
  'kv': COLUMN,
  'joined_kv': COLUMN,
  'relpos_buckets': NONE,
  'q_wi_fused': COLUMN,
  'o_wo_fused': COLUMN,
  'multiquery_heads': COLUMN,
  'kv_fused': COLUMN,
  'layer_norm_scale': NONE,
  'mlp_activations': COLUMN,
}


class Layout(NamedTuple):
  """How an optimizer sees a leaf whose axes it does not take as they are.

  Attributes:
    stack: positions of the axes that stack; every slice is a leaf of its own.
    rows: positions of the axes that a rule makes the rows of a matrix.
    columns: and those of its columns; both are empty without a rule.
    factored: whether a rule factors it; None: its sizes decide.
  """

  stack: tuple[int, ...]
  rows: tuple[int, ...] = ()
  columns: tuple[int, ...] = ()
  factored: bool | None = None

  @property
  def folds(self) -> bool:
    """Whether several axes become one: a slice `[R, C]` stays as it lies."""
    return len(self.rows) + len(self.columns) > 2


class Factors(NamedTuple):
  """Rules for factored second moments, instead of the sizes of a leaf.

  As in T5X they hold for leaves of three axes or more, and for stacks.

  Attributes:
    by_axis: `{logical axis: 'row', 'column' or 'none'}`.
    by_path: `[(path, one of these, or 'batch' for a stack, an axis)]`; first
      full match wins, and goes before `by_axis`.
  """

  by_axis: Mapping[str, str] | None = None
  by_path: Sequence[tuple[str, Sequence[str]]] = ()


def layouts(
  specs: typing.SpecTree, factors: Factors = Factors()
) -> dict[typing.Path, Layout]:
  """The layouts of leaves that stack, or that a rule speaks of.

  Args:
    specs: the parameters, with axes where they are known.
    factors: the rules.

  Raises:
    ConfigError: a rule that is none, or that leaves an axis between rows and
      columns; an axis that `by_axis` does not name.

  Example:
    >>> spec = typing.LeafSpec((8, 4, 16), 'float32', ('embed', 'layers', 'mlp'))
    >>> layouts({'wi': spec}, Factors({'embed': 'row', 'mlp': 'column'}))
    {'wi': Layout(stack=(1,), rows=(0,), columns=(2,), factored=True)}
  """
  _check(factors, specs)
  found = {path: _layout(path, spec, factors) for path, spec in specs.items()}
  return {
    path: layout
    for path, layout in found.items()
    if layout.stack or layout.factored is not None
  }


def _check(factors, specs):
  named = [*(factors.by_axis or {}).values()]
  for pattern, parts in factors.by_path:
    expression = tree.expression(pattern, 'factor rule')
    if not any(expression.fullmatch(path) for path in specs):
      raise errors.ConfigError(
        f'The factor rule {pattern!r} matches no parameter; it must match the '
        f'whole path. Parameters begin with:\n{errors.listed(list(specs), 5)}'
      )
    named += parts
  for part in named:
    if part not in PARTS:
      raise errors.ConfigError(
        errors.near(part, PARTS, 'part of a factor rule')
      )


def _layout(path, spec, factors):
  stack = axes_lib.stacked(spec)
  given = parts(path, spec, factors)
  if given is not None:
    stack = tuple(i for i, part in enumerate(given) if part == BATCH)
  if given is None or (len(spec.shape) <= 2 and not stack):
    return Layout(stack)
  rows, columns, none = (
    tuple(i for i, part in enumerate(given) if part == kind)
    for kind in (ROW, COLUMN, NONE)
  )
  if not rows or not columns:
    return Layout(stack, factored=False)
  if none:
    raise errors.ConfigError(
      f'The factor rule of {path} {list(spec.shape)} is {given}: an axis that '
      'is neither row nor column lies in a matrix of both. Call it one of '
      'them, or none of its axes.'
    )
  return Layout(stack, rows, columns, True)


def parts(
  path: typing.Path, spec: typing.LeafSpec, factors: Factors
) -> tuple[str, ...] | None:
  """What every axis is by the rules; None where they say nothing."""
  for pattern, given in factors.by_path:
    if tree.expression(pattern, 'factor rule').fullmatch(path):
      if len(given) != len(spec.shape):
        raise errors.ConfigError(
          f'The factor rule {pattern!r} has {len(given)} parts, but {path} has '
          f'the shape {list(spec.shape)}: one part an axis.'
        )
      return tuple(given)
  if factors.by_axis is None or spec.axes is None:
    return None
  stack = axes_lib.stacked(spec)
  if len(spec.shape) <= 2 and not stack:
    return None
  found = []
  for i, name in enumerate(spec.axes):
    if i not in stack and name not in factors.by_axis:
      raise errors.ConfigError(
        f'{path}: {errors.near(name, factors.by_axis, "axis of factor rules")} '
        'Say what it is in logical_factor_rules.'
      )
    found.append(BATCH if i in stack else factors.by_axis[name])
  return tuple(found)


def lay(leaf: typing.Array, layout: Layout) -> typing.Array:
  """The leaf as an optimizer sees it: `[stack..., slice...]`."""
  if not layout.folds:
    return jnp.moveaxis(leaf, layout.stack, range(len(layout.stack)))
  leaf = jnp.transpose(leaf, (*layout.stack, *layout.rows, *layout.columns))
  stacks, rows = len(layout.stack), len(layout.rows)
  sizes = leaf.shape[:stacks]
  height = math.prod(leaf.shape[stacks : stacks + rows])
  return jnp.reshape(leaf, (*sizes, height, -1))


def unlay(
  laid: typing.Array, shape: Sequence[int], layout: Layout
) -> typing.Array:
  """The inverse of `lay`, for a leaf of the given shape."""
  if not layout.folds:
    return jnp.moveaxis(laid, range(len(layout.stack)), layout.stack)
  order = (*layout.stack, *layout.rows, *layout.columns)
  laid = jnp.reshape(laid, [shape[i] for i in order])
  return jnp.transpose(laid, [order.index(i) for i in range(len(order))])
