# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Arrays on a mesh, by the rules of their logical axes."""

from collections.abc import Callable, Mapping, Sequence
import math

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.partition import meshes
from mergejax.partition import rules as rules_lib


def spec_for(
  axes: Sequence[str | None] | None,
  shape: Sequence[int] | None,
  mesh: meshes.AnyMesh,
  rules: Mapping[str, rules_lib.Target],
) -> PartitionSpec:
  """How one array with named axes is laid out.

  An axis of the mesh is used once an array: by the first axis that asks for it.
  One whose size does not divide an array's axis is left out (a vocabulary of
  259 on two model shards is replicated); of several, the last ones first.

  Args:
    axes: logical name of every axis, None for an axis without a name; None for
      an array of which nothing is known: a whole copy on every device.
    shape: its sizes; None takes them for divisible.
    mesh: from `make_mesh`.
    rules: `params` or `activations` of `rules_lib.ShardingRules`.

  Raises:
    ConfigError: a logical axis that no rule names; near ones are offered.

  Example:
    >>> from mergejax import partition
    >>> mesh = partition.make_mesh(devices=jax.devices()[:1])
    >>> rules = partition.standard().params
    >>> tuple(spec_for(('embed', 'mlp'), (8, 16), mesh, rules))
    (None, 'model')
  """
  used, spec = set(), []
  for i, name in enumerate(axes or ()):
    if name is not None and name not in rules:
      raise errors.ConfigError(
        errors.near(name, rules, 'logical axis')
        + ' Give it a rule: rules_lib.ShardingRules().replace(params={'
        + f'{name!r}: None}}) keeps it whole.'
      )
    target = rules_lib.mesh_axes(rules[name]) if name is not None else ()
    free = [axis for axis in target if axis not in used]
    while (
      free
      and shape is not None
      and shape[i] % math.prod(mesh.shape[axis] for axis in free)
    ):
      free.pop()
    used.update(free)
    spec.append(tuple(free) if len(free) > 1 else free[0] if free else None)
  return PartitionSpec(*spec)


def sharding(
  mesh: meshes.AnyMesh,
  axes: Sequence[str | None] | None,
  shape: Sequence[int] | None = None,
  rules: Mapping[str, rules_lib.Target] = rules_lib.ACTIVATIONS,
) -> NamedSharding:
  """Sharding of one array with named axes; see `spec_for`."""
  return NamedSharding(mesh, spec_for(axes, shape, mesh, rules))


def shardings(
  mesh: meshes.AnyMesh,
  shapes: typing.Tree,
  axes: Mapping[typing.Path, Sequence[str | None] | None],
  rules: rules_lib.ShardingRules,
) -> typing.Tree:
  """Shardings of a tree of parameters, or of what follows them.

  Args:
    mesh: from `make_mesh`.
    shapes: arrays, or their shapes.
    axes: `{path: logical axes}`; a path that is not there is replicated.
    rules: their `params` are used.

  Returns:
    A tree of `NamedSharding` in the structure of `shapes`.
  """
  made: dict[tuple, NamedSharding] = {}
  found = []
  for path, leaf in tree_lib.flatten(shapes).items():
    names = axes.get(path)
    kind = (None if names is None else tuple(names), tuple(leaf.shape))
    if kind not in made:
      made[kind] = sharding(mesh, *kind, rules.params)
    found.append(made[kind])
  return jax.tree.unflatten(jax.tree.structure(shapes), found)


def init_sharded(
  init: Callable[..., typing.Tree],
  shardings: typing.Tree,
  *args: typing.Array,
) -> typing.Tree:
  """Calls `init(*args)` so that every result is born in its shards.

  No device ever holds a whole copy. The numbers do not depend on the mesh: the
  random bits of an element depend on its key and its place alone.

  Args:
    init: traceable, for example `family.init`.
    shardings: of its result.
    *args: its arguments, for example a key.
  """
  return jax.jit(init, out_shardings=shardings)(*args)


def replicated(mesh: meshes.AnyMesh) -> NamedSharding:
  """The sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_host(tree: typing.Tree) -> typing.Tree:
  """Fetches arrays to every process, also those spread over processes."""

  def fetch(leaf):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)

  return jax.tree.map(fetch, tree)
