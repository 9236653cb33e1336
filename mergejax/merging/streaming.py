# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merges that grow one model at a time: the state of a method, leaf by leaf.

A soup that tries one more model and a mix whose weights are being learned keep
the state of a method and add to it; one leaf of one model is on the device at a
time.
"""

from typing import Any

import jax

from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.methods import base as base_lib


class Stream:
  """A method of one leaf, to which models are added one by one.

  Example:
    >>> import jax.numpy as jnp
    >>> from mergejax.methods import mean
    >>> stream = Stream(mean.linear())
    >>> state = stream.add(None, jnp.zeros(1))
    >>> stream.result(stream.add(state, jnp.ones(1)), jnp.float32)
    Array([0.5], dtype=float32)
  """

  def __init__(self, method: base_lib.Merge):
    """Compiles nothing yet.

    Args:
      method: one without first passes and statistics, that sees leaves as they
        lie.

    Raises:
      ValueError: the method needs more than one leaf of one model at a time.
    """
    if method.first_passes or method.needs or method.view != 'element':
      raise ValueError(
        'Only methods without first passes, statistics and views of axes can '
        'be fed one leaf of one model at a time.'
      )

    def add(state, leaf, weight, base):
      leaf = {'': numerics.widen(leaf)}
      if state is None:
        state = method.init(tree_lib.specs(leaf))
      return method.update(state, leaf, base=_laid(base), weight=weight)

    def result(state, base):
      return method.finish(state, base=_laid(base))['']

    self._add = jax.jit(add)
    self._result = jax.jit(result)

  def add(
    self,
    state: base_lib.State | None,
    leaf: typing.Array,
    weight: Any = 1.0,
    base: typing.Array | None = None,
  ) -> base_lib.State:
    """The state with one model more; None is that of no model."""
    return self._add(state, leaf, weight, base)

  def result(
    self,
    state: base_lib.State,
    dtype: Any,
    base: typing.Array | None = None,
  ) -> typing.Array:
    """The merged leaf; the state can still grow."""
    merged = self._result(state, base)
    return merged.astype(jax.dtypes.canonicalize_dtype(dtype))


def _laid(base):
  return None if base is None else {'': numerics.widen(base)}
