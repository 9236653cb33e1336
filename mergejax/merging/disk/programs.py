# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A merge method on a piece of a leaf, as compiled programs.

Numbers of a recipe are arguments, so that weights which change from layer to
layer compile nothing anew; words and flags are what a program is made for.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import numerics
from mergejax.merging import parts
from mergejax.methods import base as base_lib
from mergejax.methods import named


@functools.cache
def program(method: str, static: tuple, stage: str, number: Any):
  """The compiled call of one stage of a method.

  Stages: 'merge' to the dtype called `number`; 'look', what look `number`
  measures; 'place', where its scores lie to brackets.
  """

  def run(leaves, base, weights, keys, notes, stats, numbers, offset, brackets):
    built = named.resolve(method, **dict(static), **numbers)
    contexts = [
      base_lib.LeafContext(k, notes[k], keys[k], stats[k])
      for k in range(len(leaves))
    ]
    part = parts.Part(
      [numerics.widen(leaf) for leaf in leaves],
      None if base is None else numerics.widen(base),
      contexts,
      offset,
    )
    if stage == 'merge':
      merged = parts.run_triple(built, {'': [part]}, list(weights))[''][0]
      return merged.astype(jax.dtypes.canonicalize_dtype(number))
    own = [jnp.asarray(w, part.leaves[0].dtype) for w in weights]
    found = built.first_passes[number].measure(
      part.leaves, part.base, part.placed(), own
    )
    if stage == 'look':
      return found
    small = lambda mask: mask.astype(jnp.uint8)
    return [
      [
        small(score > low) + small(score >= low)
        + small(score >= high) + small(score > high)
        for low, high in brackets[s]
      ]
      for s, score in enumerate(found)
    ]  # fmt: skip

  return jax.jit(run)


def split_options(options: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
  """Options that a program is compiled for, and numbers that it is given."""
  static, numbers = {}, {}
  for name, value in options.items():
    values = value if isinstance(value, (list, tuple)) else [value]
    plain = all(
      isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
    )
    if plain and name != 'max_iter':
      numbers[name] = np.asarray(value, np.float32)
    else:
      static[name] = tuple(value) if isinstance(value, list) else value
  return tuple(sorted(static.items())), numbers


@functools.cache
def conclusion(method: str, static: tuple, number: int):
  """`(found, weights, numbers, notes) -> notes` of look `number`, compiled.

  The geometry of spherical means is a few hundred operations on scalars: as
  many calls for every leaf if it is not one program.
  """

  def run(found, weights, numbers, notes):
    built = named.resolve(method, **dict(static), **numbers)
    contexts = [base_lib.LeafContext(k, note) for k, note in enumerate(notes)]
    return list(
      built.first_passes[number].conclude(found, contexts, list(weights))
    )

  return jax.jit(run)
