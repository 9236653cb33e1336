# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sorted rows on a mesh: every device those of its own experts.

The tokens of a slice are gathered over the axis `expert`, each device keeps the
pairs of its experts as `dispatch.Rows`, and what experts made is summed back to
where the tokens were: an all-gather there, a scattered sum back, and no kernel
travels. Nothing is dropped however uneven the router is: a device has rows for
all pairs of its slice. With slots, `dispatch.Padded`, it would need as many for
each of its experts.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mergejax import partition
from mergejax.nn import dispatch
from mergejax.nn import grouped
from mergejax.nn import routing


@dataclasses.dataclass(frozen=True)
class Layout:
  """Axes of the mesh over which things are divided.

  Attributes:
    tokens: those of the batch, the tokens of all groups in a row.
    experts: those of the experts.
    hidden: those of the hidden units of an expert.
  """

  tokens: tuple[str, ...]
  experts: tuple[str, ...]
  hidden: tuple[str, ...]

  @property
  def devices(self) -> tuple[str, ...]:
    """Over which devices have rows of their own."""
    return (*self.tokens, *self.apart)

  @property
  def gathered(self) -> tuple[str, ...]:
    """Over which tokens are gathered for the experts."""
    return tuple(axis for axis in self.tokens if axis in self.experts)

  @property
  def apart(self) -> tuple[str, ...]:
    """Over which experts are divided, and tokens are whole already."""
    return tuple(axis for axis in self.experts if axis not in self.tokens)

  @property
  def slices(self) -> tuple[str, ...]:
    """Over which tokens stay divided."""
    return tuple(axis for axis in self.tokens if axis not in self.experts)


@dataclasses.dataclass(frozen=True)
class MeshRows:
  """`dispatch.Rows` of every device, one behind the other; see `rows`.

  Attributes:
    found: `(pairs, rows, weights, sizes)` as of `dispatch.Rows`, those of all
      devices joined along their first axis.
    spare: likewise.
    shape: `(groups, tokens)` of the batch.
    layout: what is divided over what.
  """

  found: tuple[jax.Array, ...]
  spare: int
  shape: tuple[int, int]
  layout: Layout

  def to_experts(self, tokens):
    """`<float>[groups, tokens, embed] -> <float>[devices rows, embed]`."""
    at = self.layout
    flat = tokens.reshape(-1, tokens.shape[-1])
    fn = lambda own, part: own.to_experts(_whole(part, at)[None])
    return self._mapped(fn, (at.tokens, None), (at.devices, None))(flat)

  def product(self, values, kernels, *, back=False):
    at = self.layout
    outer, inner = (at.devices, None), (at.devices, at.hidden)
    given, made = (inner, outer) if back else (outer, inner)
    ends = (at.hidden, None) if back else (None, at.hidden)
    parts = at.hidden if back else ()

    def multiplied(own, values, kernels):
      product = own.product(values, kernels)
      return jax.lax.psum(product, parts) if parts else product

    kernel = at.experts, *ends
    return self._mapped(multiplied, given, made, kernel)(values, kernels)

  def to_tokens(self, values):
    at = self.layout
    dtype, k = values.dtype, self.found[1].shape[-1]
    if k > 1:  # a token's sum is that of several devices
      values = values.astype(jnp.float32)

    def summed(own, values):
      part = own.to_tokens(values)[0]
      if at.apart:
        part = jax.lax.psum(part, at.apart)
      if at.gathered:
        part = jax.lax.psum_scatter(part, at.gathered, tiled=True)
      return part.astype(dtype)

    found = self._mapped(summed, (at.devices, None), (at.tokens, None))(values)
    return found.reshape(*self.shape, -1)

  def by_expert(self, values):
    at = self.layout
    fn = lambda own, values: own.by_expert(values)
    found = at.experts, at.slices, None
    return self._mapped(fn, (at.devices, None), found)(values)

  def _mapped(self, fn, given, made, *more):
    """A function of the `dispatch.Rows` of a device and its parts of arrays."""
    devices = self.layout.devices

    def called(found, *arrays):
      return fn(dispatch.Rows(*found, spare=self.spare), *arrays)

    own = tuple(_spec(devices, *(None,) * (x.ndim - 1)) for x in self.found)
    specs = own, *(_spec(*axes) for axes in (given, *more))
    return functools.partial(_shards(called, specs, _spec(*made)), self.found)


def rows(choices: routing.Choices, experts: int, *, hidden: int) -> MeshRows:
  """Lays the kept pairs of all groups in the order of experts, on each device.

  Inside of `partition.rules_of`, by whose rules tokens and experts are divided.

  Args:
    choices: of tokens.
    experts: how many there are.
    hidden: units of an expert's hidden layer.
  """
  groups, tokens, k = choices.experts.shape
  sizes = (
    ('batch', groups * tokens),
    ('expert', experts),
    ('expert_mlp', hidden),
  )
  at = Layout(*(_axes(name, size) for name, size in sizes))
  count = experts // _parts(at.experts)

  def own(chosen, kept, weights):
    chosen, kept, weights = (_whole(x, at) for x in (chosen, kept, weights))
    first = jax.lax.axis_index(at.experts) * count if at.experts else 0
    mine = kept & (chosen >= first) & (chosen < first + count)
    pairs, place, sizes = _in_order(chosen - first, mine, count)
    return pairs, place, weights, sizes

  flat = (
    x.reshape(-1, k) for x in (choices.experts, choices.kept, choices.weights)
  )
  line, table = _spec(at.devices), _spec(at.devices, None)
  given = (_spec(at.tokens, None),) * 3
  found = _shards(own, given, (line, table, table, line))(*flat)
  room = _room(groups * tokens // _parts(at.slices), k, count)
  return MeshRows(found, grouped.spare_rows(room), (groups, tokens), at)


def _room(tokens, k, count):
  """Rows of a device: a token has no more experts there than there are."""
  return tokens * min(k, count)


def _in_order(chosen, mine, count):
  """`(pairs, rows, sizes)` of `dispatch.Rows`, of pairs that are a device's.

  Args:
    chosen: `<int32>[tokens, k]` numbers among its experts, where they are its.
    mine: `<bool>[tokens, k]`.
    count: of its experts.
  """
  total = chosen.size
  room = _room(*chosen.shape, count)
  spare = grouped.spare_rows(room)
  expert = jnp.where(mine, chosen, count).reshape(-1)
  order = jnp.argsort(expert, stable=True).astype(jnp.int32)
  place = jnp.argsort(order).astype(jnp.int32).reshape(mine.shape)
  # Of no expert here the row is 0 everywhere.
  sizes = jnp.sum(jax.nn.one_hot(expert, count, dtype=jnp.int32), 0)
  pairs = jnp.where(jnp.arange(room) < jnp.sum(sizes), order[:room], total)
  pairs = jnp.pad(pairs, (0, spare), constant_values=total)
  return pairs, jnp.where(mine, place, room + spare), sizes


def _whole(part, at):
  """The tokens of a slice, from the devices that have its experts."""
  if not at.gathered:
    return part
  return jax.lax.all_gather(part, at.gathered, tiled=True)


def _axes(name, size):
  """The axes of the mesh that a logical axis of this size is divided over."""
  (part,) = partition.active_spec((name,), (size,))
  axes = (part,) if isinstance(part, str) else part or ()
  return tuple(axis for axis in axes if _parts((axis,)) > 1)


def _parts(axes):
  mesh: Any = partition.active_mesh()
  return math.prod(mesh.shape[axis] for axis in axes)


def _spec(*axes):
  return PartitionSpec(*(part or None for part in axes))


def _shards(
  fn: Callable[..., Any], given: Any, made: Any
) -> Callable[..., Any]:
  """A function of the parts of arrays, called on every device of the mesh."""
  return jax.shard_map(
    fn, mesh=partition.active_mesh(), in_specs=given, out_specs=made,
    check_vma=False,
  )  # fmt: skip
