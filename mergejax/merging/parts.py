# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of leaves laid before a method, and the triple that is run on them.

A part is a leaf, a slice of a stack or a piece on disk, of all models. First
passes and the triple see nothing else, so merges in memory, on disk and on a
mesh share these lines.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import numerics
from mergejax.core import statistic_specs
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.methods import base as base_lib


class Part(NamedTuple):
  """One leaf, a slice of a stack or a piece, of all models, laid for a method.

  Attributes:
    leaves: one array a model, in the accumulation dtype.
    base: the base's, or None.
    contexts: one a model, without `place`.
    offset: flat position of the first element in the whole leaf.
  """

  leaves: list[typing.Array]
  base: typing.Array | None
  contexts: list[base_lib.LeafContext]
  offset: Any = 0

  def placed(self) -> list[base_lib.LeafContext]:
    """The contexts, knowing where their elements are."""
    place = (self.leaves[0].shape, self.offset)
    return [context._replace(place=place) for context in self.contexts]


class Layout:
  """How one leaf is laid before a method: its slices, and their axes.

  The roles of the axes are found once for a leaf, whatever the number of models
  and statistics.
  """

  def __init__(
    self,
    path: typing.Path,
    spec: typing.LeafSpec,
    method: base_lib.Merge,
    first: int = 0,
  ):
    """Finds the roles of the axes, as far as the method must know them.

    Args:
      path: of the leaf.
      spec: of it, or of the part of a stack that is at hand.
      method: whose view of the axes is meant.
      first: of a part, its place in the whole stack, along its first axis.

    Raises:
      UserError: the method must know which axes are inputs, and nothing says
        so; it numbers elements, and a slice has too many.
    """
    if method.numbers_elements:
      numerics.check_countable(path, axes_lib.slice_size(spec))
    self._kind = method.view
    self._shape = spec.shape
    if method.view != 'element':
      view = axes_lib.view(path, spec)
    else:
      stack = axes_lib.stacked(spec) if method.of_slices else ()
      view = axes_lib.View(stack, (), ())
    self._stack = view.stack
    rest = sorted(view.inputs + view.outputs)
    self._view = axes_lib.View(
      (),
      tuple(rest.index(i) for i in view.inputs),
      tuple(rest.index(i) for i in view.outputs),
    )
    stack = np.ndindex(*(spec.shape[i] for i in view.stack))
    # `(name, position in the stack)` of every slice.
    name = lambda at: ''.join(
      f'[{i if k else i + first}]' for k, i in enumerate(at)
    )
    self.slices = [(path + name(at), at) for at in stack]

  def cut(self, leaf: typing.Array, at: tuple[int, ...]) -> typing.Array:
    """A slice of a leaf, laid before the method; `join` takes it back."""
    if self._stack:
      front = range(len(self._stack))
      leaf = jnp.moveaxis(leaf, self._stack, front)[at]
    return axes_lib.lay(leaf, self._view, self._kind)

  def cut_statistic(
    self,
    need: statistic_specs.StatisticSpec,
    found: typing.Array,
    at: tuple[int, ...],
  ) -> typing.Array:
    """The statistic of a slice: all but those like leaves are stack first."""
    return self.cut(found, at) if need.is_leaf else found[at]

  def join(self, outs: Sequence[typing.Array]) -> typing.Array:
    """A leaf from its merged slices, in the order of `slices`."""
    rest = tuple(n for i, n in enumerate(self._shape) if i not in self._stack)
    laid = [axes_lib.unlay(out, rest, self._view, self._kind) for out in outs]
    if not self._stack:
      return laid[0]
    front = tuple(self._shape[i] for i in self._stack)
    whole = jnp.stack(laid).reshape(front + rest)
    return jnp.moveaxis(whole, range(len(self._stack)), self._stack)


def at_dtype(weights: Sequence[Any], leaf: typing.Array) -> list[typing.Array]:
  """The weights as numbers of a leaf's dtype."""
  return [jnp.asarray(weight, leaf.dtype) for weight in weights]


def measure(
  first_pass: base_lib.FirstPass, part: Part, weights: Sequence[Any]
) -> Any:
  """What a first pass finds in one part."""
  return first_pass.measure(
    part.leaves, part.base, part.placed(), at_dtype(weights, part.leaves[0])
  )


def run_triple(
  method: base_lib.Merge,
  slices: Mapping[str, Part],
  weights: Sequence[Any],
) -> dict[str, typing.Array]:
  """The triple over laid slices: `{name: result}` for `{name: slice}`."""
  contexts = {name: part.placed() for name, part in slices.items()}
  specs = {
    name: tree_lib.leaf_spec(part.leaves[0]) for name, part in slices.items()
  }
  base: Any = {name: part.base for name, part in slices.items()}
  if any(leaf is None for leaf in base.values()):
    base = None
  state = method.init(specs)
  for k, weight in enumerate(weights):
    state = method.update(
      state,
      {name: part.leaves[k] for name, part in slices.items()},
      base=base,
      weight=weight,
      contexts={name: own[k] for name, own in contexts.items()},
    )
  return method.finish(state, base=base)
