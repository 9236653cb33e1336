# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A merge method with its options, and its stages as compiled programs.

Numbers of a recipe are arguments of a program, so that weights which change
from layer to layer compile nothing anew; a program is made for the words and
flags.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import numerics
from mergejax.merging import parts
from mergejax.methods import base as base_lib
from mergejax.methods import entries


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
  """A method with its options: parameters of equal settings share one.

  Attributes:
    entry: what is known of the method.
    options: by their names in Python.
    method: the method, built once.
  """

  entry: entries.MethodEntry
  options: Mapping[str, Any]
  method: base_lib.Merge

  @functools.cached_property
  def _split(self):
    static, numbers = self.entry.split(self.options)
    arrays = {n: np.asarray(x, np.float32) for n, x in numbers.items()}
    return static, arrays

  @property
  def numbers(self) -> dict[str, np.ndarray]:
    """The options that programs are given: <float32>[] or [models]."""
    return self._split[1]

  def program(self, stage: str, number: Any) -> Callable[..., Any]:
    """A compiled stage, for whatever numbers; see `_program`."""
    return _program(self.entry, self._split[0], stage, number)

  def conclusion(self, number: int) -> Callable[..., Any]:
    """What first pass `number` concludes, compiled; see `_conclusion`."""
    return _conclusion(self.entry, self._split[0], number)


# Of the menu there are few; methods given as values come and go.
@functools.lru_cache(1024)
def _program(
  entry: entries.MethodEntry, static: tuple, stage: str, number: Any
):
  """The compiled call of one stage of a method.

  Stages: 'merge' to the dtype called `number`; 'measure', what first pass
  `number` finds; 'bracket', where its scores lie to brackets.
  """

  def run(leaves, base, weights, keys, notes, stats, numbers, offset, brackets):
    built = entry.build(**dict(static), **numbers)
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
      merged = parts.run_triple(built, {'': part}, list(weights))['']
      return merged.astype(jax.dtypes.canonicalize_dtype(number))
    found = parts.measure(built.first_passes[number], part, list(weights))
    if stage == 'measure':
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


@functools.lru_cache(1024)
def _conclusion(entry: entries.MethodEntry, static: tuple, number: int):
  """`(found, weights, numbers, notes) -> notes` of one first pass, compiled.

  The geometry of spherical means is a few hundred operations on scalars: as
  many calls for every leaf if it is not one program.
  """

  def run(found, weights, numbers, notes):
    built = entry.build(**dict(static), **numbers)
    contexts = [base_lib.LeafContext(k, note) for k, note in enumerate(notes)]
    return list(
      built.first_passes[number].conclude(found, contexts, list(weights))
    )

  return jax.jit(run)
