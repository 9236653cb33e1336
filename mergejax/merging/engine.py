# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The first passes of a method, over leaves wherever they lie.

A driver says how one pass over one leaf is made: over arrays in memory or on a
mesh (`ArrayLeaf`), or piece by piece from disk (`merging.disk.pieces.Leaf`).
What is combined, ranked and concluded, in which order, is the same for all.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import numerics
from mergejax.merging import parts as parts_lib
from mergejax.methods import base as base_lib


class Leaf(Protocol):
  """A leaf of all models, or a slice of a stack, while it is merged.

  Attributes:
    size: its elements.
    contexts: what is known of it so far, one a model.
  """

  @property
  def size(self) -> int: ...

  @property
  def contexts(self) -> list[base_lib.LeafContext]: ...

  def total(self, number: int) -> Any:
    """What first pass `number`, one without ranks, finds over the leaf."""

  def conclude(self, number: int, found: Any) -> None:
    """Adds what first pass `number` concludes to the contexts."""


Cuts = Callable[
  [int, Sequence[Any], Sequence[Sequence[Any]]],
  Sequence[Sequence[Sequence[numerics.Cut]]],
]


def run_first_passes(
  method: base_lib.Merge, leaves: Sequence[Leaf], scope: str, cuts: Cuts
) -> None:
  """Runs the first passes of one scope; the leaves keep what they find.

  Args:
    method: whose passes they are.
    leaves: taken together: all leaves of the model for the scope 'tree', one
      leaf (or slice) for 'leaf'.
    scope: 'leaf' or 'tree'.
    cuts: `(number, leaves, ranks) -> [leaf][score][rank]`, the exact order
      statistics of the scores of first pass `number` over the leaves.
  """
  for number, first_pass in enumerate(method.first_passes):
    if first_pass.scope != scope or not leaves:
      continue
    if first_pass.ranks is None:
      found = leaves[0].total(number)
      for leaf in leaves[1:]:
        found = combined(first_pass, found, leaf.total(number))
      of_leaves = [found] * len(leaves)
    else:
      size = sum(leaf.size for leaf in leaves)
      ranks = first_pass.ranks(size, leaves[0].contexts)
      of_leaves = cuts(number, leaves, ranks)
    for leaf, found in zip(leaves, of_leaves):
      leaf.conclude(number, found)


def combined(first_pass: base_lib.FirstPass, total: Any, found: Any) -> Any:
  """What two parts of a leaf, or two leaves, found, taken together."""

  def combine(a, b):
    if first_pass.combine == 'sum':
      return a + b
    # float64 of NumPy stays what it is.
    plain = isinstance(a, (np.ndarray, np.generic))
    return np.maximum(a, b) if plain else jnp.maximum(a, b)

  return jax.tree.map(combine, total, found)


def with_notes(
  contexts: Sequence[base_lib.LeafContext], notes: Sequence[base_lib.Note]
) -> list[base_lib.LeafContext]:
  """Contexts that also know what a first pass concluded."""
  return [
    context._replace(note={**context.note, **note})
    for context, note in zip(contexts, notes)
  ]


class ArrayLeaf:
  """A leaf, or a slice of a stack, whose arrays are in memory."""

  def __init__(
    self,
    method: base_lib.Merge,
    part: parts_lib.Part,
    weights: Sequence[Any],
  ):
    self.part = part
    self.size = math.prod(part.leaves[0].shape)
    self._method = method
    self._weights = weights

  @property
  def contexts(self) -> list[base_lib.LeafContext]:
    """One a model."""
    return self.part.contexts

  def total(self, number: int) -> Any:
    """See `Leaf`; for a pass with ranks, the scores."""
    first_pass = self._method.first_passes[number]
    return parts_lib.measure(first_pass, self.part, self._weights)

  def conclude(self, number: int, found: Any) -> None:
    """See `Leaf`."""
    weights = parts_lib.at_dtype(self._weights, self.part.leaves[0])
    notes = self._method.first_passes[number].conclude(
      found, self.contexts, weights
    )
    self.part = self.part._replace(contexts=with_notes(self.contexts, notes))


def array_cuts(
  number: int, leaves: Sequence[ArrayLeaf], ranks: Sequence[Sequence[Any]]
) -> list[list[list[numerics.Cut]]]:
  """`Cuts` of arrays: counts, so that sharded ones are not gathered."""
  measured = [leaf.total(number) for leaf in leaves]
  indices = [leaf.part.placed()[0].index for leaf in leaves]
  found = [[] for _ in leaves]
  for s, wanted in enumerate(ranks):
    scores = [one[s] for one in measured]
    cuts = [numerics.largest(scores, rank, indices) for rank in wanted]
    for p, own in enumerate(found):
      own.append([cut[p] for cut in cuts])
  return found
