# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the functions of a merge method take and give, as types.

Arguments are given by position unless they are keywords here, so that a
function may call them as it likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mergejax.core import typing

if TYPE_CHECKING:
  from mergejax.methods import base as base_lib

# Of a method: whatever `init` gives, a pytree of arrays.
State = Any
# A few numbers of a leaf by name, as first passes leave them.
Note = Mapping[str, Any]
Leaves = Mapping[typing.Path, typing.Array]
Contexts = Mapping[typing.Path, 'base_lib.LeafContext']


class InitFn(Protocol):
  """Gives the state before the first model: zeros."""

  def __call__(self, specs: typing.SpecTree, /) -> State: ...


class UpdateFn(Protocol):
  """Takes one model into the state."""

  def __call__(
    self,
    state: State,
    params: Leaves,
    /,
    *,
    base: Leaves | None = None,
    weight: Any = 1.0,
    contexts: Contexts | None = None,
  ) -> State: ...


class FinishFn(Protocol):
  """Gives the merged leaves, not yet cast."""

  def __call__(
    self, state: State, /, *, base: Leaves | None = None
  ) -> dict[typing.Path, typing.Array]: ...


class LeafUpdateFn(Protocol):
  """`UpdateFn` of one leaf; base is None where there is none."""

  def __call__(
    self,
    state: State,
    leaf: typing.Array,
    base: Any,
    weight: typing.Array,
    context: base_lib.LeafContext,
    /,
  ) -> State: ...


class LeafFinishFn(Protocol):
  """`FinishFn` of one leaf."""

  def __call__(self, state: State, base: Any, /) -> typing.Array: ...


class CombineFn(Protocol):
  """Merges the copies that all models have of a leaf, at once."""

  def __call__(
    self,
    leaves: list[Any],
    base: Any,
    weights: list[Any],
    contexts: list[base_lib.LeafContext],
    /,
  ) -> typing.Array: ...


class SingleFn(Protocol):
  """Makes a leaf of the result from that of the only model."""

  def __call__(
    self, leaf: typing.Array, base: Any, context: base_lib.LeafContext, /
  ) -> typing.Array: ...


class MeasureFn(Protocol):
  """Measures a piece of a leaf, in all models, for a first pass.

  Without ranks it gives a pytree of small arrays that combine over pieces; with
  ranks a list of scores `<float32>[...]`, each with one number an element.
  """

  def __call__(
    self,
    leaves: Sequence[Any],
    base: Any,
    contexts: Sequence[base_lib.LeafContext],
    weights: Sequence[Any],
    /,
  ) -> Any: ...


class ConcludeFn(Protocol):
  """Turns what was measured of a leaf into one note for each model."""

  def __call__(
    self,
    found: Any,
    contexts: Sequence[base_lib.LeafContext],
    weights: Sequence[Any],
    /,
  ) -> Sequence[Note]: ...


class RanksFn(Protocol):
  """Which order statistics of each score are wanted, for a leaf of a size."""

  def __call__(
    self, size: int, contexts: Sequence[base_lib.LeafContext], /
  ) -> Sequence[Sequence[Any]]: ...
