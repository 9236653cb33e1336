# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Groups of tokens that are routed by themselves, and room for them.

Source: flaxformer's layer, whose numbers these are.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing


def capacity(factor: float, tokens: int, experts: int, minimum: int = 4) -> int:
  """Tokens of a group that one expert has room for.

  `max(round(factor tokens / experts), minimum)`, rounded half to even.

  Args:
    factor: how much more than a fair share; Switch trains with 1.25.
    tokens: of a group.
    experts: how many there are.
    minimum: flaxformer's 4: of few tokens a share is no more than noise.

  Raises:
    ConfigError: a factor that is no positive number.

  Example:
    >>> capacity(1.25, 512, 8), capacity(1.0, 20, 8, minimum=1)
    (80, 2)
  """
  errors.check_number('The capacity factor', factor, 0.0, open_below=True)
  return max(int(round(factor * tokens / experts)), minimum)


def gshard_capacity(tokens: int, experts: int, *, train: bool) -> int:
  """Tokens of a group that one expert has room for in fairseq's top-2.

  `2 ceil(tokens / experts)` in training, `ceil(tokens / 4)` else.
  """
  return 2 * math.ceil(tokens / experts) if train else math.ceil(tokens / 4)


def group_count(
  tokens: int,
  max_size: int,
  experts: int,
  replicas: int = 1,
  strict: bool = False,
) -> int:
  """How many groups some tokens are divided into.

  The smallest number, not below `tokens // max_size` nor `replicas experts`,
  that divides the tokens and is a multiple of `replicas experts`.

  Args:
    tokens: of the batch.
    max_size: tokens that a group should not exceed by much: the count begins at
      `tokens // max_size`, as in flaxformer.
    experts: how many there are.
    replicas: copies of every expert, each with groups of its own; flaxformer
      takes devices over (expert x model partitions).
    strict: groups must be of `max_size` exactly.

  Raises:
    ConfigError: there is no such number.

  Example:
    >>> group_count(4096, 4096, 8), group_count(96, 16, 6, 2)
    (8, 12)
  """
  unit = replicas * experts
  count = max(tokens // max_size, unit)
  while count < tokens and (tokens % count or count % unit):
    count += 1
  told = f'{tokens} tokens, {experts} experts, {replicas} replicas'
  if count > tokens or tokens % count or count % unit:
    raise errors.ConfigError(
      f'The tokens of a batch do not divide into groups ({told}; the last '
      f'count tried: {count}): their number must be a multiple of experts x '
      'replicas. Choose another batch size or length.'
    )
  if strict and tokens // count != max_size:
    raise errors.ConfigError(
      f'Groups have {tokens // count} tokens ({told}), but '
      f'strict_group_size asks for {max_size}.'
    )
  return count


def padded_shape(
  batch: int, length: int, experts: int, replicas: int = 1
) -> tuple[int, int]:
  """`(batch, length)` that `replicas experts` divides, of the fewest tokens.

  One of the two grows, and the length of two that cost the same.

  Example:
    >>> padded_shape(2, 7, 4), padded_shape(3, 5, 4)
    ((2, 8), (4, 5))
  """
  unit = replicas * experts
  if batch * length % unit == 0:
    return batch, length
  rows, columns = batch, length
  while rows * length % unit:
    rows += 1
  while batch * columns % unit:
    columns += 1
  if (rows - batch) * length < (columns - length) * batch:
    return rows, length
  return batch, columns


@dataclasses.dataclass(frozen=True)
class Groups:
  """How the tokens of a batch are divided, and put together again.

  Attributes:
    shape: `(batch, length)` as it came.
    padded: the same with the rows or positions that were added.
    count: of groups.
  """

  shape: tuple[int, int]
  padded: tuple[int, int]
  count: int

  @property
  def tokens(self) -> int:
    """Tokens of a group."""
    return math.prod(self.padded) // self.count

  def divide(self, values: typing.Array) -> jax.Array:
    """`[batch, length, features] -> [groups, tokens, features]`, 0 if added."""
    return self._padded(values).reshape(
      self.count, self.tokens, values.shape[-1]
    )

  def join(self, values: typing.Array) -> jax.Array:
    """The inverse of `divide`."""
    values = values.reshape(*self.padded, values.shape[-1])
    return values[: self.shape[0], : self.shape[1]]

  def real(self, real: typing.Array | None) -> jax.Array | None:
    """Which tokens are real, `<bool>[groups, tokens]`; None if all are.

    Args:
      real: `<bool>[batch, length]`, or None: all of them.
    """
    if real is None and self.padded == self.shape:
      return None
    if real is None:
      real = jnp.ones(self.shape, bool)
    return self._padded(real).reshape(self.count, self.tokens)

  def _padded(self, values):
    more = [(0, n - own) for n, own in zip(self.padded, self.shape)]
    return jnp.pad(values, more + [(0, 0)] * (values.ndim - 2))


def groups(
  batch: int,
  length: int,
  experts: int,
  *,
  max_size: int,
  replicas: int = 1,
  strict: bool = False,
) -> Groups:
  """Divides `[batch, length]` tokens, see `group_count` and `padded_shape`.

  Example:
    >>> groups(2, 7, 4, max_size=4)
    Groups(shape=(2, 7), padded=(2, 8), count=4)
  """
  padded = padded_shape(batch, length, experts, replicas)
  count = group_count(math.prod(padded), max_size, experts, replicas, strict)
  return Groups((batch, length), padded, count)
