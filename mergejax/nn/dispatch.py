# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens to their experts and back, in one of two forms that agree.

`Rows`: pairs of token and expert in the order of experts, none of them empty,
for grouped products; on a mesh see `dispatch_mesh`. `Padded`: a slot for all that
an expert has room for, of a shape that does not depend on the router, for batched
products; on a mesh one exchange there and one back. Neither ever has an array
`[tokens, experts, capacity]`, as the masks of the papers are.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import typing
from mergejax.nn import grouped
from mergejax.nn import routing


class Dispatch(Protocol):
  """Where every token goes; values lie as `to_experts` lays them."""

  def to_experts(self, tokens: typing.Array) -> jax.Array:
    """`<float>[groups, tokens, embed]` -> what the experts are given."""
    ...

  def product(
    self, values: typing.Array, kernels: typing.Array, *, back: bool = False
  ) -> jax.Array:
    """Of every expert's values with its kernel of `[experts, in, out]`.

    Args:
      values: as `to_experts` lays them.
      kernels: of the dtype of the values.
      back: they lead from hidden units to the residual stream.
    """
    ...

  def to_tokens(self, values: typing.Array) -> jax.Array:
    """Weighted sums of what experts made, `<float>[groups, tokens, embed]`."""
    ...

  def by_expert(self, values: typing.Array) -> jax.Array:
    """`<float>[experts, ..., features]`, 0 where there is no token."""
    ...


@dataclasses.dataclass(frozen=True)
class Rows:
  """Pairs in the order of experts, of all groups together; see `rows`.

  Attributes:
    pairs: `<int32>[rows]` which pair, token k + choice, is in a row; the number
      of pairs in rows behind the last one.
    rows: `<int32>[tokens, k]` in which row a pair is; the number of rows where
      it was dropped.
    weights: `<float32>[tokens, k]`.
    sizes: `<int32>[experts]` rows of each.
    spare: rows that are behind the last one in any case.
  """

  pairs: jax.Array
  rows: jax.Array
  weights: jax.Array
  sizes: jax.Array
  spare: int

  def to_experts(self, tokens):
    """`<float>[groups, tokens, embed] -> <float>[rows, embed]`."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    # The number of pairs, of a row without one, becomes that of tokens.
    return moved(flat, self.pairs // self.rows.shape[1], self.rows)

  def product(self, values, kernels, *, back=False):
    del back
    return grouped.grouped_dot(values, kernels, self.sizes, spare=self.spare)

  def to_tokens(self, values):
    # [rows, embed] -> [tokens k, embed] -> [1, tokens, embed]
    own = moved(values, self.rows.reshape(-1), self.pairs[:, None])
    own = own.reshape(*self.rows.shape, values.shape[-1])
    return _weighted(own, self.weights)[None]

  def by_expert(self, values):
    ends = jnp.cumsum(self.sizes)
    at = jnp.arange(len(values))[None]
    mine = (at < ends[:, None]) & (at >= (ends - self.sizes)[:, None])
    return jnp.where(mine[..., None], values, 0)


def rows(
  choices: routing.Choices, experts: int, capacity: int | None = None
) -> Rows:
  """Lays the kept pairs of all groups in the order of experts, sorted.

  Args:
    choices: of tokens.
    experts: how many there are.
    capacity: that they were made with; fewer rows do then.
  """
  groups, tokens, k = choices.experts.shape
  counts = kept_counts(choices, experts)
  # Where the queue of a group begins among the rows: behind those of earlier
  # experts, and of earlier groups with the same expert.
  total = jnp.sum(counts, 0)
  begins = (jnp.cumsum(total) - total)[None] + jnp.cumsum(counts, 0) - counts
  begin = jax.vmap(lambda own, at: own[at])(begins, choices.experts)
  count = room = groups * tokens * k
  if capacity is not None:
    room = min(count, groups * experts * capacity)
  row = jnp.where(choices.kept, begin + choices.positions, room)
  row = row.reshape(-1)
  order = jnp.argsort(row)[:room].astype(jnp.int32)
  pairs = jnp.where(jnp.arange(room) < jnp.sum(total), order, count)
  spare = grouped.spare_rows(room)
  pairs = jnp.pad(pairs, (0, spare), constant_values=count)
  row = jnp.where(row < room, row, room + spare)
  return Rows(
    pairs, row.reshape(-1, k), choices.weights.reshape(-1, k), total, spare
  )


@dataclasses.dataclass(frozen=True)
class Padded:
  """A slot for whatever experts have room for; see `padded`.

  Attributes:
    pairs: `<int32>[groups, experts capacity]` which pair of the group, token k
      + choice, is in a slot; the number of pairs where it is empty.
    slots: `<int32>[groups, tokens, k]` in which slot of the group a pair is;
      the number of slots where it was dropped.
    weights: `<float32>[groups, tokens, k]`.
    experts: how many.
  """

  pairs: jax.Array
  slots: jax.Array
  weights: jax.Array
  experts: int

  def to_experts(self, tokens):
    """`<float>[groups, tokens, embed] -> <float>[experts, groups, slots, embed]`."""
    k = self.slots.shape[-1]
    return _spread(
      _by_group(
        lambda own, pairs, slots: jax.vmap(moved)(own, pairs // k, slots),
        tokens, self.pairs, self.slots,
      ),
      self.experts,
    )  # fmt: skip

  def product(self, values, kernels, *, back=False):
    del back
    return batched_dot(values, kernels)

  def to_tokens(self, values):
    k = self.slots.shape[-1]

    def combine(own, pairs, slots, weights):
      found = jax.vmap(moved)(
        own, slots.reshape(len(slots), -1), pairs[..., None]
      )
      return _weighted(found.reshape(*slots.shape[:2], k, -1), weights)

    return _by_group(
      combine, _gathered(values), self.pairs, self.slots, self.weights
    )

  def by_expert(self, values):
    return values


def padded(choices: routing.Choices, experts: int, capacity: int) -> Padded:
  """Gives every kept pair its slot.

  Args:
    choices: of tokens.
    experts: how many there are.
    capacity: slots of an expert in each group; those of a group's tokens are
      enough for everything.
  """
  _, tokens, k = choices.experts.shape
  count = tokens * k
  counts = kept_counts(choices, experts)
  begins = jnp.cumsum(counts, -1) - counts

  def of_group(own, begin, size):
    row = jnp.where(own.kept, begin[own.experts] + own.positions, count)
    order = jnp.argsort(row.reshape(-1)).astype(jnp.int32)
    places = jnp.arange(capacity)[None]
    at = jnp.minimum(begin[:, None] + places, count - 1)
    filled = places < size[:, None]
    return jnp.where(filled, order[at], count).reshape(-1)

  pairs = jax.vmap(of_group)(choices, begins, counts)
  slot = choices.experts * capacity + choices.positions
  slots = jnp.where(choices.kept, slot, experts * capacity)
  return Padded(pairs, slots, choices.weights, experts)


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Slots that experts filled themselves, see `routing.experts_choose`."""

  slots: routing.Slots
  tokens: int

  def to_experts(self, tokens):
    """`<float>[groups, tokens, embed] -> <float>[experts, groups, slots, embed]`."""

    def take(own, at):
      at = at.reshape(len(at), -1)
      return jax.vmap(lambda x, i: _taken(x, i))(own, at)

    taken = _by_group(take, tokens, self.slots.tokens)
    return _spread(taken, self.slots.tokens.shape[1])

  def product(self, values, kernels, *, back=False):
    del back
    return batched_dot(values, kernels)

  def to_tokens(self, values):
    def add(own, at, weights):
      flat = lambda x: x.reshape(len(x), -1)
      own = own.astype(jnp.float32) * flat(weights)[..., None]
      empty = jnp.zeros((self.tokens, own.shape[-1]), jnp.float32)
      scatter = lambda rows, i: empty.at[i].add(rows, mode='drop')
      return jax.vmap(scatter)(own, flat(at)).astype(values.dtype)

    return _by_group(
      add, _gathered(values), self.slots.tokens, self.slots.weights
    )

  def by_expert(self, values):
    return values


def kept_counts(choices: routing.Choices, experts: int) -> jax.Array:
  """`<int32>[groups, experts]`: kept pairs of every expert."""
  hot = jax.nn.one_hot(choices.experts, experts, dtype=jnp.int32)
  return jnp.sum(hot * choices.kept[..., None].astype(jnp.int32), (1, 2))


def batched_dot(values: typing.Array, kernels: typing.Array) -> jax.Array:
  """`<float>[experts, groups, slots, in] -> [experts, groups, slots, out]`.

  Every expert's with its kernel of `[experts, in, out]`, as one batched product.
  """
  flat = values.reshape(len(values), -1, values.shape[-1])
  found = jax.lax.dot_general(flat, kernels, (((2,), (1,)), ((0,), (0,))))
  return found.reshape(*values.shape[:-1], kernels.shape[-1])


@jax.custom_vjp
def moved(
  values: typing.Array, index: typing.Array, inverse: typing.Array
) -> jax.Array:
  """`values[index]`, whose gradient is gathered too rather than scattered.

  Args:
    values: `<float>[n, features]`.
    index: `<int32>[m]`; n or more gives zeros.
    inverse: `<int32>[n, times]` all places of `index` where a value is taken;
      m or more for none.

  Returns:
    `<float>[m, features]`.
  """
  del inverse
  return _taken(values, index)


def _moved(values, index, inverse):
  return _taken(values, index), inverse


def _moved_back(inverse, given):
  flat = _taken(given, inverse.reshape(-1))
  own = flat.reshape(*inverse.shape, given.shape[-1]).astype(jnp.float32)
  return jnp.sum(own, 1).astype(given.dtype), None, None


moved.defvjp(_moved, _moved_back)


def _taken(values, index):
  # Not by a weight of 0: what a slot without a token holds may be NaN.
  return jnp.take(values, index, axis=0, mode='fill', fill_value=0)


def _weighted(values, weights):
  """`sum_k weights values`, summed in float32: `[..., k, d] -> [..., d]`."""
  products = values.astype(jnp.float32) * weights[..., None]
  return jnp.sum(products, -2).astype(values.dtype)


def _by_group(fn: Callable, *arrays):
  """A function of groups, each on the device that has it."""
  axes = [('batch',) + (None,) * (array.ndim - 1) for array in arrays]
  return partition.by_shard(fn, axes, ('batch', None, None))(*arrays)


def _spread(values, experts):
  """`[groups, experts capacity, embed]`, from each group to the experts.

  On a mesh groups are spread over `data` and `expert`, and experts over
  `expert`: this is one all-to-all inside every `data` slice.
  """
  groups, _, embed = values.shape
  values = values.reshape(groups, experts, -1, embed)
  values = partition.constrain(values, ('batch', None, None, None))
  return partition.constrain(
    jnp.swapaxes(values, 0, 1), ('expert', 'expert_replicas', None, None)
  )


def _gathered(values):
  """The inverse of `_spread`."""
  values = partition.constrain(
    values, ('expert', 'expert_replicas', None, None)
  )
  values = jnp.swapaxes(values, 0, 1)
  values = partition.constrain(values, ('batch', None, None, None))
  groups, _, _, embed = values.shape
  return values.reshape(groups, -1, embed)
