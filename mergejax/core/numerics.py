# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Precision decisions and exact order statistics, in one place."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import typing


def is_traced(value: object) -> bool:
  """True if JAX is tracing: what the value is cannot be looked at."""
  return isinstance(value, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]


def is_averaged(dtype: Any) -> bool:
  """True for floating dtypes: step counters and ids are never averaged."""
  return jnp.issubdtype(dtype, jnp.floating)


def accumulation_dtype(dtype: Any) -> np.dtype:
  """float64 for float64 if JAX has it enabled, float32 for every other float.

  bfloat16 keeps about three digits of a weight: the difference of two such
  weights must be formed after the cast, or small task vectors vanish.
  """
  wide = np.float64 if dtype == np.float64 else np.float32
  return jax.dtypes.canonicalize_dtype(wide)


def widen(leaf: typing.Array) -> typing.Array:
  """Casts a floating leaf to its accumulation dtype."""
  return jnp.asarray(leaf, accumulation_dtype(leaf.dtype))


class Cut(NamedTuple):
  """The `rank` largest of many scores, ties going to the lowest index.

  Attributes:
    threshold: <float32>[], the rank-th largest score.
    end: <uint32>[], scores equal to the threshold belong to the largest at
      positions before this one.
  """

  threshold: Any
  end: Any


def above(scores: typing.Array, cut: Cut, index: typing.Array) -> typing.Array:
  """Which scores belong to the largest that a cut describes.

  Args:
    scores: <float32>[...].
    cut: from `largest`.
    index: <uint32>[...] position of every score, the order that broke ties.

  Returns:
    <bool>[...] with exactly `rank` True over all scores.
  """
  scores = scores.astype(jnp.float32)
  threshold = jnp.asarray(cut.threshold, jnp.float32)
  end = jnp.asarray(cut.end, jnp.uint32)
  return (scores > threshold) | ((scores == threshold) & (index < end))


def _order_key(scores: typing.Array) -> typing.Array:
  """float32 as uint32 in the same order; -0 and 0 share a key."""
  bits = lax.bitcast_convert_type(
    scores.astype(jnp.float32) + jnp.float32(0), jnp.uint32
  )
  negative = bits >> jnp.uint32(31) == 1
  return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _largest_true(holds, upper: int) -> typing.Array:
  """The largest uint32 up to `upper` at which a falling condition holds."""

  def narrow(_, bounds):
    low, high = bounds
    middle = low + (high - low) // jnp.uint32(2) + (high - low) % jnp.uint32(2)
    yes = holds(middle)
    return (
      jnp.where(yes, middle, low),
      jnp.where(yes, high, middle - jnp.uint32(1)),
    )

  low, high = jnp.uint32(0), jnp.uint32(upper)
  return lax.fori_loop(0, 32, narrow, (low, high))[0]


# Counts of the elements of one array; of several together, two of these.
_COUNT = jnp.uint32


class _Total(NamedTuple):
  """A count that may exceed one word: `high * words + low`."""

  high: jax.Array
  low: jax.Array

  def __add__(self, count):
    low = self.low + count
    return _Total(self.high + (low < count).astype(low.dtype), low)

  def __sub__(self, other):
    borrow = (self.low < other.low).astype(self.low.dtype)
    return _Total(self.high - other.high - borrow, self.low - other.low)

  def at_least(self, other):
    same = self.high == other.high
    return (self.high > other.high) | (same & (self.low >= other.low))


def _zero() -> _Total:
  return _Total(jnp.zeros((), _COUNT), jnp.zeros((), _COUNT))


def _total(rank: Any) -> _Total:
  if isinstance(rank, (int, np.integer)):
    words = jnp.iinfo(_COUNT).max + 1
    high, low = divmod(int(rank), words)
    return _Total(jnp.asarray(high, _COUNT), jnp.asarray(low, _COUNT))
  return _Total(jnp.zeros((), _COUNT), jnp.asarray(rank, _COUNT))


def largest(
  scores: Sequence[typing.Array],
  rank: Any,
  indices: Sequence[typing.Array],
) -> list[Cut]:
  """Cuts off the `rank` largest of all scores, exactly and without a sort.

  Bisection over the 32 bits of a score, each round one count: on sharded
  arrays a local count and one sum over devices, never a gather. Ties at the
  threshold go to the earlier array, then to the lower index.

  Args:
    scores: <float32>[...] arrays, ranked together; fewer than 2**32 elements
      each, any number together.
    rank: how many to keep, 0 to their total size: a whole number, or <uint32>[]
      that may be traced.
    indices: <uint32>[...] for each array, positions that break its ties.

  Returns:
    One `Cut` for each array: same threshold, its own end.

  Raises:
    UserError: an array of 2**32 elements or more.

  Example:
    >>> scores = jnp.array([3.0, 1.0, 3.0, 2.0])
    >>> cut, = largest([scores], 1, [jnp.arange(4, dtype=jnp.uint32)])
    >>> above(scores, cut, jnp.arange(4, dtype=jnp.uint32)).tolist()
    [True, False, False, False]
  """
  for one in scores:
    check_countable('an array', one.size)
  return _largest(scores, _total(rank), indices)


def check_countable(what: str, size: int) -> None:
  """Refuses leaves whose elements 32 bits cannot number.

  Raises:
    UserError: `size` is 2**32 or more.
  """
  if size > jnp.iinfo(_COUNT).max:
    raise errors.StructureError(
      f'{what} has {size:,} elements in one piece; random masks and exact '
      'ranks number at most 4,294,967,295. If it is a stack of layers or '
      "experts, name the axis they are stacked along ('layers', 'expert') in "
      '`axes`; else leave it as it is with a rule, or use a method without them.'
    )


@jax.jit
def _largest(scores, wanted, indices):
  keys = [_order_key(one) for one in scores]
  number = lambda mask: jnp.sum(mask, dtype=_COUNT)

  def count(masks):
    total = _zero()
    for mask in masks:
      total = total + number(mask)
    return total

  key = _largest_true(
    lambda k: count(one >= k for one in keys).at_least(wanted), 2**32 - 1
  )
  positive = key >> jnp.uint32(31) == 1
  bits = jnp.where(positive, key & jnp.uint32(2**31 - 1), ~key)
  threshold = lax.bitcast_convert_type(bits, jnp.float32)
  nothing = (wanted.high == 0) & (wanted.low == 0)
  threshold = jnp.where(nothing, jnp.float32(jnp.inf), threshold)
  left = wanted - count(one > key for one in keys)
  cuts = []
  for one, index in zip(keys, indices):
    equal = one == key
    here = number(equal)
    here = jnp.where(left.high == 0, jnp.minimum(here, left.low), here)
    left = left - _Total(jnp.zeros_like(here), here)
    last = _largest_true(
      lambda i, e=equal, n=index, h=here: number(e & (n < i)) < h, 2**32 - 2
    )
    end = jnp.where(here == 0, jnp.uint32(0), last + jnp.uint32(1))
    cuts.append(Cut(threshold, end))
  return cuts
