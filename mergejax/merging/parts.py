# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of leaves laid before a method, and what is run on them.

A part is a leaf, a slice of a stack or a piece on disk, of all models. Looks
and the triple see nothing else, so merges in memory, on disk and on a mesh
share these lines.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mergejax.core import axes as axes_lib
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.methods import base as base_lib


class Part(NamedTuple):
  """One leaf, a slice of a stack or a piece, of all models, laid for a method.

  Attributes:
    leaves: one array a model, in the accumulation dtype.
    base: the base's, or None.
    marks: one a model, without `place`.
    offset: flat position of the first element in the whole leaf.
  """

  leaves: list[typing.Array]
  base: typing.Array | None
  contexts: list[base_lib.LeafContext]
  offset: Any = 0

  def placed(self) -> list[base_lib.LeafContext]:
    """The marks, knowing where their elements are."""
    place = (self.leaves[0].shape, self.offset)
    return [context._replace(place=place) for context in self.contexts]


def unstacked(view):
  """The view of one slice of a stack."""
  rest = sorted(view.inputs + view.outputs)
  return axes_lib.View(
    (),
    tuple(rest.index(i) for i in view.inputs),
    tuple(rest.index(i) for i in view.outputs),
  )


def lay_slice(leaf, view, at, kind):
  """Slice `at` of a stack, laid before the method."""
  if view.stack:
    leaf = jnp.moveaxis(leaf, view.stack, range(len(view.stack)))[at]
  return axes_lib.lay(leaf, unstacked(view), kind)


def with_notes(
  contexts: Sequence[base_lib.LeafContext], notes: Sequence[base_lib.Note]
) -> list[base_lib.LeafContext]:
  """Marks with what a look found added."""
  return [m._replace(note={**m.note, **n}) for m, n in zip(contexts, notes)]


def _measured(first_pass, parts, weights):
  result = []
  for part in parts:
    own = [jnp.asarray(w, part.leaves[0].dtype) for w in weights]
    result.append(
      first_pass.measure(part.leaves, part.base, part.placed(), own)
    )
  return result


def measure(
  first_pass: base_lib.FirstPass, parts: Sequence[Part], weights: Sequence[Any]
) -> list[Any]:
  """What a look without ranks finds, for each part: the same for all."""
  combine = jnp.maximum if first_pass.combine == 'max' else jnp.add
  total, *rest = _measured(first_pass, parts, weights)
  for one in rest:
    total = jax.tree.map(combine, total, one)
  return [total] * len(parts)


def rank(
  first_pass: base_lib.FirstPass,
  parts: Sequence[Part],
  weights: Sequence[Any],
  ranks: Sequence[Sequence[Any]],
) -> list[list[list[numerics.Cut]]]:
  """What a look with ranks finds: `[part][score][rank]` cuts."""
  measured = _measured(first_pass, parts, weights)
  found = [[] for _ in parts]
  indices = [part.placed()[0].index for part in parts]
  for s, wanted in enumerate(ranks):
    scores = [one[s] for one in measured]
    cuts = [numerics.largest(scores, one, indices) for one in wanted]
    for p, own in enumerate(found):
      own.append([cut[p] for cut in cuts])
  return found


def run_triple(
  method: base_lib.Merge,
  parts: Mapping[str, Sequence[Part]],
  weights: Sequence[Any],
) -> dict[str, list[typing.Array]]:
  """The triple over laid slices: `{path: results}` for `{path: slices}`."""
  names = {
    path: [path if len(own) == 1 else f'{path}[{j}]' for j in range(len(own))]
    for path, own in parts.items()
  }
  slices = {
    name: part
    for path, own in parts.items()
    for name, part in zip(names[path], own)
  }
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
  merged = method.finish(state, base=base)
  return {path: [merged[name] for name in own] for path, own in names.items()}
