# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which units of a model can change places: permutation groups of its leaves.

An axis of a leaf is a product of factors, most often of one: `heads * head_dim`
of two, the flattened map `height * width * channels` of three. A factor carries
the name of a group (its positions may be permuted, with those of all other
factors of that name), of a stack (they stay, but each may have permutations of
its own), or None.

A permutation is `{group: index}`: position i of the permuted model holds unit
`index[i]`. A group with parents has one index for every position of its
parents, `<int32>[*parents, size]`: units of each layer of a scanned stack, or
head dimensions of each head.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

Permutation = dict[str, np.ndarray]


class Factor(NamedTuple):
  """Part of an axis: a group or stack, or None for what may not move."""

  name: str | None
  size: int


class Group(NamedTuple):
  """Units that are permuted together.

  Attributes:
    size: their number.
    parents: groups or stacks for each position of which they are permuted by
      themselves.
  """

  size: int
  parents: tuple[str, ...] = ()


class PermutationSpec(NamedTuple):
  """The permutation groups of a model.

  Attributes:
    leaves: `{path: for each axis its factors}`, every leaf of the model.
    groups: `{name: Group}`.
    stacks: `{name: size}` of axes that stay but separate permutations.
    notes: what could not be permuted, in words.
  """

  leaves: Mapping[typing.Path, tuple[tuple[Factor, ...], ...]]
  groups: Mapping[str, Group]
  stacks: Mapping[str, int]
  notes: tuple[str, ...] = ()

  def describe(self) -> str:
    """One line a group: its size and what carries it."""
    lines = []
    for name, group in self.groups.items():
      places = [
        f'{path}:{i}'
        for path, axes in self.leaves.items()
        for i, axis in enumerate(axes)
        if any(factor.name == name for factor in axis)
      ]
      each = f' for each of {", ".join(group.parents)}' if group.parents else ''
      lines.append(
        f'{name}: {group.size} units{each}, on {len(places)} axes: '
        + ', '.join(places[:4])
        + (', ...' if len(places) > 4 else '')
      )
    return '\n'.join([*lines, *self.notes])

  def leaves_with(self, name: str) -> list[typing.Path]:
    """Paths of the leaves that carry a group."""
    return [
      path
      for path, axes in self.leaves.items()
      if any(factor.name == name for axis in axes for factor in axis)
    ]


def permutation_spec(
  axes: Mapping[typing.Path, Sequence[str | None]], params: typing.Tree
) -> PermutationSpec:
  """A specification written by hand: a group name or None for every axis.

  Args:
    axes: `{path: names}`, every leaf of the model.
    params: arrays or their shapes.

  Returns:
    The specification, checked.

  Raises:
    UserError: leaves that are not in the tree or not in the specification, a
      wrong number of axes, sizes that conflict, one name twice on a leaf.

  Example:
    >>> spec = permutation_spec({'a': (None, 'P'), 'b': ('P', None)},
    ...                         {'a': np.ones((2, 3)), 'b': np.ones((3, 1))})
    >>> spec.groups
    {'P': Group(size=3, parents=())}
  """
  specs = tree_lib.specs(params)
  lines = [f'- {p}: not in the specification' for p in specs if p not in axes]
  lines += [f'+ {p}: not a leaf of the model' for p in axes if p not in specs]
  groups: dict[str, Group] = {}
  leaves = {}
  for path, spec in specs.items():
    names = tuple(axes.get(path, ()))
    if path not in axes:
      continue
    if len(names) != len(spec.shape):
      lines.append(
        f'! {path}: {len(names)} names for {len(spec.shape)} axes '
        f'{list(spec.shape)}'
      )
      continue
    known = [name for name in names if name is not None]
    for name in {n for n in known if known.count(n) > 1}:
      lines.append(f'! {path}: {name} on two axes, which cannot be matched')
    for name, size in zip(names, spec.shape):
      if name is not None and groups.setdefault(name, Group(size)).size != size:
        lines.append(
          f'! {path}: {name} has {size} units here and {groups[name].size} '
          'elsewhere'
        )
    leaves[path] = tuple((Factor(n, s),) for n, s in zip(names, spec.shape))
  if lines:
    raise errors.StructureError(
      f'The permutation specification does not fit:\n{errors.listed(lines)}'
    )
  return PermutationSpec(leaves, groups, {})


def identity(spec: PermutationSpec) -> Permutation:
  """The permutation that moves nothing."""
  result = {}
  for name, group in spec.groups.items():
    index = np.arange(group.size, dtype=np.int32)
    result[name] = np.broadcast_to(index, index_shape(spec, name)).copy()
  return result


def size_of(spec: PermutationSpec, name: str) -> int:
  """Positions of a group or a stack."""
  return spec.stacks[name] if name in spec.stacks else spec.groups[name].size


def index_shape(spec: PermutationSpec, name: str) -> tuple[int, ...]:
  """`[*parents, size]`."""
  group = spec.groups[name]
  return (*(size_of(spec, p) for p in group.parents), group.size)


def check_permutation(spec: PermutationSpec, permutation: Permutation) -> None:
  """Checks that every index of a permutation is one.

  Raises:
    UserError: groups that are missing or unknown, a wrong shape, an index that
      does not hold every number once.
  """
  lines = [f'- {n} is missing' for n in spec.groups if n not in permutation]
  lines += [f'+ {n} is unknown' for n in permutation if n not in spec.groups]
  for name, index in permutation.items():
    if name not in spec.groups:
      continue
    index = np.asarray(index)
    if index.shape != index_shape(spec, name):
      lines.append(
        f'! {name} is {list(index.shape)}, not {list(index_shape(spec, name))}'
      )
    elif not (np.sort(index, axis=-1) == np.arange(index.shape[-1])).all():
      lines.append(f'! {name} does not hold each of its numbers once')
  if lines:
    raise errors.StructureError(
      f'This is no permutation of these groups:\n{errors.listed(lines)}'
    )


def unfolded(spec: PermutationSpec, path: str, leaf: Any) -> Any:
  """A leaf with one axis for every factor."""
  return leaf.reshape([f.size for axis in spec.leaves[path] for f in axis])


def permute_leaf(
  spec: PermutationSpec,
  path: typing.Path,
  leaf: Any,
  permutation: Mapping[str, Any],
) -> Any:
  """Applies permutations to an unfolded leaf; groups not given stay."""
  factors = [f.name for axis in spec.leaves[path] for f in axis]
  xp: Any = np if isinstance(leaf, np.ndarray) else jnp
  # Leaders first: those that follow are numbered in their new places.
  groups = [
    n
    for n in factors
    if n is not None and n in spec.groups and n in permutation
  ]
  for name in sorted(groups, key=lambda n: len(spec.groups[n].parents)):
    at, index = factors.index(name), permutation[name]
    parents = spec.groups[name].parents
    if not parents:
      leaf = xp.take(leaf, index, axis=at)
      continue
    places = [*(factors.index(p) for p in parents), at]
    order = np.argsort(places)
    shape = [1] * len(factors)
    for place in places:
      shape[place] = leaf.shape[place]
    laid = xp.transpose(xp.asarray(index), [int(i) for i in order])
    leaf = xp.take_along_axis(leaf, laid.reshape(shape), axis=at)
  return leaf


def permute(
  spec: PermutationSpec, permutation: Permutation, params: typing.Tree
) -> typing.Tree:
  """The model with its units in new places; it computes the same function.

  Args:
    spec: the groups.
    permutation: `{group: index}`; unit i of the result is unit `index[i]`.
    params: the model.

  Returns:
    A tree of the same structure and dtypes.

  Raises:
    UserError: a permutation or a tree that does not fit the specification.
  """
  check_permutation(spec, permutation)
  check_model(spec, params, 'the model')
  return tree_lib.map_paths(
    lambda path, leaf: permute_leaf(
      spec, path, unfolded(spec, path, leaf), permutation
    ).reshape(leaf.shape),
    params,
  )


def check_model(spec: PermutationSpec, params: typing.Tree, name: str) -> None:
  """Raises when a tree does not have the leaves of a specification."""
  expected = {
    path: typing.LeafSpec(
      tuple(math.prod(f.size for f in axis) for axis in axes),
      np.dtype('float32'),
    )
    for path, axes in spec.leaves.items()
  }
  tree_lib.check_same(
    expected, tree_lib.specs(params),
    expected_name='the permutation specification', given_name=name,
  )  # fmt: skip


def check_function(
  apply: Callable[..., Any],
  before: typing.Tree,
  after: typing.Tree,
  *inputs: Any,
  tolerance: float = 1e-3,
) -> float:
  """Checks that two models compute the same on a batch.

  Args:
    apply: `(params, *inputs) -> outputs`.
    before: the model.
    after: it, permuted.
    inputs: a batch; random numbers will do.
    tolerance: largest difference allowed, over the largest output.

  Returns:
    The largest difference over the largest output.

  Raises:
    UserError: they differ by more: the specification is wrong for this model.
  """
  first = jax.tree.leaves(jax.jit(apply)(before, *inputs))
  second = jax.tree.leaves(jax.jit(apply)(after, *inputs))
  worst = 0.0
  for a, b in zip(first, second):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    worst = max(worst, np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
  if not worst <= tolerance:
    raise errors.StructureError(
      f'The permuted model gives other outputs (largest difference {worst:.1e} '
      'of the largest output): the permutation specification is wrong for this '
      'model, and nothing is written.'
    )
  return float(worst)


def random_permutation(spec: PermutationSpec, seed: int = 0) -> Permutation:
  """A random permutation of every group: the model must compute the same."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.permuted(index, axis=-1) for name, index in identity(spec).items()
  }


def matching(spec: PermutationSpec, patterns: Sequence[str]) -> set[str]:
  """Names of groups that full-match any of the patterns.

  Raises:
    UserError: a pattern that is none, or matches no group.
  """
  found = set()
  for pattern in patterns:
    matches = tree_lib.expression(pattern, 'pattern').fullmatch
    own = set(filter(matches, spec.groups))
    if not own:
      raise errors.ConfigError(
        f'{pattern!r} matches no permutation group:\n'
        f'{errors.listed(list(spec.groups))}'
      )
    found |= own
  return found
