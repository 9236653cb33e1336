# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Meshes, and the rules that lay arrays out on them.

The only place that builds a `Mesh`. The axes are always `branch` (experts side
by side, outermost: the one that may cross a slow network), `data`, `expert`
(mixture-of-experts) and `model`, each of size 1 unless asked for, so that one
set of definitions serves one device and a pod.

What goes where is an argument: `ShardingRules` map the names of logical axes,
which a model family gives, to axes of the mesh.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import dataclasses
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

AXES = ('branch', 'data', 'expert', 'model')

# What an axis of an array is spread over: an axis of the mesh, several (the
# first one outermost), or none.
Target = str | tuple[str, ...] | None

# T5X's standard rules, with the two axes of experts and those of images added.
_PARAMS: Mapping[str, Target] = {
  'branch': 'branch',
  'expert': 'expert',
  'expert_mlp': 'model',
  'mlp_embed': None,
  'unmodeled': None,
  'vocab': 'model',
  'mlp': 'model',
  'heads': 'model',
  'joined_kv': 'model',
  'embed': None,
  'kv': None,
  'relpos_buckets': None,
  'length': None,
  'layers': None,
  'height': None,
  'width': None,
  'channels': None,
  'classes': None,
  'one': None,
  'experts': None,
  'rank': None,
  'routes': None,
  'tasks': None,
  'inputs': None,
  'outputs': None,
}
_ACTIVATIONS: Mapping[str, Target] = {
  **_PARAMS,
  'batch': ('data', 'expert'),
  # Of what experts were sent: groups, of which every `data` slice has its own.
  'expert_replicas': 'data',
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Which axis of the mesh a logical axis is spread over.

  Attributes:
    params: `{logical axis: mesh axis, several, or None}` for parameters and
      what follows them: moments of an optimizer, running averages. None is a
      whole copy on every slice.
    activations: likewise for batches and what a model computes of them.

  Example:
    >>> rules = ShardingRules().replace(params={'embed': ('data', 'expert')})
    >>> rules.params['embed'], rules.params['mlp']
    (('data', 'expert'), 'model')
  """

  params: Mapping[str, Target] = dataclasses.field(
    default_factory=lambda: dict(_PARAMS)
  )
  activations: Mapping[str, Target] = dataclasses.field(
    default_factory=lambda: dict(_ACTIVATIONS)
  )

  def __post_init__(self):
    for kind in ('params', 'activations'):
      for name, target in getattr(self, kind).items():
        for axis in _as_tuple(target):
          if axis not in AXES:
            raise errors.ConfigError(
              f'The rule {name!r} of {kind}: {errors.near(axis, AXES, "mesh axis")}'
            )

  def replace(
    self,
    params: Mapping[str, Target] | None = None,
    activations: Mapping[str, Target] | None = None,
  ) -> 'ShardingRules':
    """The same rules but for those given; unknown names are new rules."""
    return ShardingRules(
      {**self.params, **(params or {})},
      {**self.activations, **(activations or {})},
    )


def standard() -> ShardingRules:
  """T5X's standard rules: tensor parallelism over `model`, rows over `data`."""
  return ShardingRules()


def fsdp() -> ShardingRules:
  """The standard rules, with parameters and moments spread over `data` too.

  No device holds a whole parameter; each is gathered where it is used.

  Source: Zhao et al., "PyTorch FSDP" (2023), https://arxiv.org/abs/2304.11277.
  """
  return ShardingRules().replace(params={'embed': 'data', 'mlp_embed': 'data'})


def join_processes(
  coordinator_address: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
) -> None:
  """Makes the processes of a run one program; call it before anything else.

  Args:
    coordinator_address: `host:port` of the first process. On a TPU pod, under
      Slurm and the like, leave all three out: the environment tells.
    process_count: how many processes there are.
    process_index: which one this is, from 0.

  Raises:
    UserError: the processes could not find each other.
  """
  # The default on CPU has no collectives between processes.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      coordinator_address, process_count, process_index
    )
  except (ValueError, RuntimeError) as error:
    raise errors.ConfigError(
      f'The processes could not join ({error}). Give --coordinator_address, '
      '--process_count and --process_index to every one of them.'
    ) from error


def make_mesh(
  *,
  branch: int = 1,
  data: int = -1,
  expert: int = 1,
  model: int = 1,
  devices: Sequence[Any] | None = None,
  **unknown: Any,
) -> jax.sharding.Mesh:
  """Builds the mesh `(branch, data, expert, model)`.

  Args:
    branch: experts side by side.
    data: data parallelism; -1 takes the devices that are left.
    expert: expert parallelism of mixture-of-experts layers.
    model: tensor parallelism.
    devices: defaults to all devices of all processes.
    **unknown: axes that a mesh does not have; see below.

  Returns:
    A mesh whose axes are `Auto`: the compiler propagates shardings from those
    of the arguments. Of several TPU slices, `branch` goes over the network
    between them, then `data`; what an expert shares stays inside a slice.

  Raises:
    UserError: an axis of another name, a size that is no whole number, sizes
      that do not multiply to the number of devices, or branch and data that
      cannot cross the slices that these are of.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'branch': 1, 'data': 1, 'expert': 1, 'model': 1}
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = dict(branch=branch, data=data, expert=expert, model=model)
  for name in unknown:
    raise errors.ConfigError(errors.near(name, AXES, 'mesh axis'))
  for name, size in sizes.items():
    if size != -1:
      errors.check_whole(f'Mesh axis {name}', size)
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if (
    len(free) > 1
    or len(devices) % fixed
    or (not free and fixed != len(devices))
  ):
    raise errors.ConfigError(
      f'Mesh {sizes} does not fit {len(devices)} device(s): the sizes must '
      f'multiply to {len(devices)}, with at most one -1 for what is left.'
    )
  for name in free:
    sizes[name] = len(devices) // fixed
  shape = tuple(sizes[name] for name in AXES)
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  try:
    if slices > 1:
      return jax.sharding.Mesh(
        _over_slices(devices, slices, shape), AXES, axis_types=kinds
      )
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
  except NotImplementedError as error:  # of a torus that they do not fit
    raise errors.ConfigError(
      f'Mesh {sizes} cannot be laid out on these chips: each axis must be the '
      'product of sides of the slice, v5p:4x4x4 can be data 16, model 4. '
      f'({str(error).partition(". ")[0]}.)'
    ) from error


def _over_slices(devices, slices, shape):
  """Devices of several slices, the outermost axes over the slow network.

  `branch` crosses slices as far as its size allows, then `data`; all other
  axes stay inside a slice.
  """
  branch = math.gcd(slices, shape[0])
  data = slices // branch
  if shape[1] % data:
    raise errors.ConfigError(
      f'{slices} slices must divide branch x data of the mesh '
      f'{dict(zip(AXES, shape))}: other axes do not cross the slow network '
      'between slices.'
    )
  outer = (branch, data) + (1,) * (len(shape) - 2)
  inner = tuple(whole // part for whole, part in zip(shape, outer))
  return mesh_utils.create_hybrid_device_mesh(
    inner,
    outer,
    devices=devices,
    # As `jax.make_mesh`: these slices are flat, and large axes must be folded.
    allow_split_physical_axes=devices[0].device_kind == 'TPU v5 lite',
  )


def spec_for(
  axes: Sequence[str | None] | None,
  shape: Sequence[int] | None,
  mesh: jax.sharding.Mesh,
  rules: Mapping[str, Target],
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
    rules: `params` or `activations` of `ShardingRules`.

  Raises:
    ConfigError: a logical axis that no rule names; near ones are offered.

  Example:
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> tuple(spec_for(('embed', 'mlp'), (8, 16), mesh, standard().params))
    (None, 'model')
  """
  used, spec = set(), []
  for i, name in enumerate(axes or ()):
    if name is not None and name not in rules:
      raise errors.ConfigError(
        errors.near(name, rules, 'logical axis')
        + ' Give it a rule: ShardingRules().replace(params={'
        + f'{name!r}: None}}) keeps it whole.'
      )
    target = _as_tuple(rules[name]) if name is not None else ()
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


def _as_tuple(target: Target) -> tuple[str, ...]:
  return (target,) if isinstance(target, str) else tuple(target or ())


def sharding(
  mesh: jax.sharding.Mesh,
  axes: Sequence[str | None] | None,
  shape: Sequence[int] | None = None,
  rules: Mapping[str, Target] = _ACTIVATIONS,
) -> NamedSharding:
  """Sharding of one array with named axes; see `spec_for`."""
  return NamedSharding(mesh, spec_for(axes, shape, mesh, rules))


def shardings(
  mesh: jax.sharding.Mesh,
  shapes: typing.Tree,
  axes: Mapping[typing.Path, Sequence[str | None] | None],
  rules: ShardingRules,
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


_ACTIVE: contextvars.ContextVar = contextvars.ContextVar('rules', default=None)


@contextlib.contextmanager
def rules_of(mesh: jax.sharding.Mesh, rules: ShardingRules) -> Iterator[None]:
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
      spec_for(names, x.shape, mesh, rules.activations)
      for names, x in zip(axes, arrays, strict=True)
    ]
    found = spec_for(found_axes, arrays[0].shape, mesh, rules.activations)
    return jax.shard_map(
      fn, mesh=mesh, in_specs=tuple(specs), out_specs=found, check_vma=False
    )(*arrays)

  return called


def device_count() -> int:
  """How many devices a program that is traced now is divided over."""
  active = _ACTIVE.get()
  return 1 if active is None else active[0].size


def platform() -> str:
  """What a program that is traced now is for: 'cpu', 'gpu', 'tpu'.

  The devices of the mesh of `rules_of`, which may be described only; else those
  of this machine.
  """
  active = _ACTIVE.get()
  if active is None:
    return jax.default_backend()
  return active[0].devices.flat[0].platform


def _constrained(x, axes, mesh, rules):
  spec = spec_for(axes, x.shape, mesh, rules.activations)
  # What should be spread but does not divide is for the compiler to lay out.
  spec = PartitionSpec(*(
    PartitionSpec.UNCONSTRAINED
    if part is None and (name is None or rules.activations[name])
    else part
    for name, part in zip(axes, spec)
  ))  # fmt: skip
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding that puts a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_host(tree: typing.Tree) -> typing.Tree:
  """Fetches arrays to every process, also those spread over processes."""

  def fetch(leaf):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)

  return jax.tree.map(fetch, tree)
