# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How activations lie, told to the compiler while a program is traced.

Modules say logical axes where layers meet; the mesh and the rules are those of
`rules_of` around them.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from mergejax.core import typing
from mergejax.partition import layouts
from mergejax.partition import meshes
from mergejax.partition import rules as rules_lib

_ACTIVE: contextvars.ContextVar = contextvars.ContextVar('rules', default=None)


@contextlib.contextmanager
def rules_of(
  mesh: meshes.AnyMesh, rules: rules_lib.ShardingRules
) -> Iterator[None]:
  """While a program is traced inside, `constrain` lays activations out."""
  token = _ACTIVE.set((mesh, rules))
  try:
    yield
  finally:
    _ACTIVE.reset(token)


@contextlib.contextmanager
def rows_alone() -> Iterator[None]:
  """While traced inside, `constrain` spreads activations over rows only.

  For small networks with whole parameters on every device: nothing of theirs is
  worth sending over the axis `model`.
  """
  active = _ACTIVE.get()
  if active is None:
    yield
    return
  mesh, rules = active
  whole = {name: None for name in rules.activations if name != 'batch'}
  with rules_of(mesh, rules.replace(activations=whole)):
    yield


def constrain(x: typing.Tree, axes: Sequence[str | None]) -> typing.Tree:
  """Tells the compiler how activations lie; the numbers stay as they are.

  Modules call it where layers meet. Outside of `rules_of` it gives back `x`.

  Args:
    x: `<any>[...]`, or several with the same axes.
    axes: a logical name for every axis, None where the compiler may choose.
  """
  active = _ACTIVE.get()
  if active is None or active[0].size == 1:
    return x
  mesh, rules = active
  return jax.tree.map(lambda leaf: _constrained(leaf, axes, mesh, rules), x)


def by_shard(
  fn: Callable[..., typing.Array],
  axes: Sequence[Sequence[str | None]],
  found_axes: Sequence[str | None],
) -> Callable[..., typing.Array]:
  """A function of arrays that every device calls on its own parts of them.

  For kernels that the compiler cannot divide. Outside of `rules_of` it is `fn`.

  Args:
    fn: of the parts of arrays; no part may depend on another.
    axes: of each argument, as of `constrain`; what divides is divided.
    found_axes: of the result; a size that does not divide there must not divide
      in the arguments either.
  """
  active = _ACTIVE.get()
  if active is None or active[0].size == 1:
    return fn
  mesh, rules = active

  def called(*arrays):
    specs = [
      layouts.spec_for(names, x.shape, mesh, rules.activations)
      for names, x in zip(axes, arrays, strict=True)
    ]
    found = layouts.spec_for(
      found_axes, arrays[0].shape, mesh, rules.activations
    )
    return jax.shard_map(
      fn, mesh=mesh, in_specs=tuple(specs), out_specs=found, check_vma=False
    )(*arrays)

  return called


def active_mesh() -> meshes.AnyMesh | None:
  """The mesh of `rules_of` around; None outside, and for one device."""
  active = _ACTIVE.get()
  return None if active is None or active[0].size == 1 else active[0]


def active_spec(
  axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
  """How an activation lies by the rules of `rules_of` around; whole outside.

  Args:
    axes: as of `constrain`.
    shape: its sizes; what divides is divided.
  """
  active = _ACTIVE.get()
  if active is None:
    return PartitionSpec(*(None,) * len(axes))
  mesh, rules = active
  return layouts.spec_for(axes, shape, mesh, rules.activations)


def device_count() -> int:
  """How many devices a program that is traced now is divided over."""
  active = _ACTIVE.get()
  return 1 if active is None else active[0].size


def platform() -> str:
  """What a program that is traced now is for: 'cpu', 'gpu', 'tpu'.

  The devices of the mesh of `rules_of`, which may be described only; else, and
  for a mesh that has none, those of this machine.
  """
  active = _ACTIVE.get()
  if active is None or isinstance(active[0], jax.sharding.AbstractMesh):
    return jax.default_backend()
  return active[0].devices.flat[0].platform


def _constrained(x, axes, mesh, rules):
  spec = layouts.spec_for(axes, x.shape, mesh, rules.activations)
  # What should be spread but does not divide is for the compiler to lay out.
  spec = PartitionSpec(*(
    PartitionSpec.UNCONSTRAINED
    if part is None and (name is None or rules.activations[name])
    else part
    for name, part in zip(axes, spec)
  ))  # fmt: skip
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
