# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is to be compiled: functions of abstract arguments that lie on a mesh."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import outer as outer_lib
from mergejax.merging import in_memory
from mergejax.methods import base as methods
from mergejax.methods import mean
from mergejax.training import batches
from mergejax.training import trainer as trainer_lib

Statistics = Mapping[typing.Path, Mapping[str, typing.LeafSpec]]


class Program(NamedTuple):
  """One function that is compiled by itself.

  Attributes:
    fn: what `jax.jit` made.
    arguments: shapes with shardings.
    times: how often it runs, with other arguments of the same shapes.
  """

  fn: Any
  arguments: tuple[Any, ...]
  times: int = 1


@dataclasses.dataclass(frozen=True)
class Work:
  """Programs that run one after the other, and all that lies there meanwhile.

  Attributes:
    name: what is done, for people.
    mesh: where.
    programs: in any order.
    held: `{role: tree of shapes with shardings}`: what the programs are given,
      all together.
    parameters: numbers of one model.
    rows: of a batch, of one model; 0 if there is none.
    tokens: positions of a batch, inputs and targets, of all models.
  """

  name: str
  mesh: jax.sharding.Mesh
  programs: tuple[Program, ...]
  held: Mapping[str, Any]
  parameters: int = 0
  rows: int = 0
  tokens: int = 0


def training_step(
  trainer: trainer_lib.Trainer,
  lengths: Mapping[str, int | None],
  *,
  rows: int,
  steps: int = 1000,
) -> Work:
  """The step of a run, as `Trainer.fit` compiles it.

  Of experts that are merged while they train it is the step between two merges;
  see `outer_merge`.

  Args:
    trainer: on a mesh of described devices or of real ones.
    lengths: `{name: positions}` of the arrays of a batch, None of one with one
      number a row; no data are opened.
    rows: of a batch; of experts, of each of them.
    steps: of the whole run, for its schedules.

  Raises:
    DataError: rows that do not divide over the mesh.
  """
  step, layout, state = _begun(trainer, steps)
  experts = (len(trainer.experts or ()),) if trainer.lead else ()
  batch = {
    name: _rows(trainer, name, (*experts, rows), length)
    for name, length in lengths.items()
  }
  tokens = rows * math.prod(experts) * sum(
    lengths.get(name) or 0
    for name in ('encoder_input_tokens', 'decoder_target_tokens')
  )  # fmt: skip
  compiled = trainer.compile(step, layout)
  if isinstance(compiled, outer_lib.MergingStep):
    compiled = compiled.ordinary
  return Work(
    'training step',
    trainer.mesh,
    (Program(compiled, (state, batch)),),
    {**_held(state), 'batch': batch},
    parameters=sum(spec.size for spec in trainer.specs.values()),
    rows=rows,
    tokens=tokens,
  )


def outer_merge(trainer: trainer_lib.Trainer, *, steps: int = 1000) -> Work:
  """The merge of experts that are one model again every so many steps.

  Args:
    trainer: a `BranchTrainer` with an `Outer`.
    steps: see `training_step`.

  Raises:
    ConfigError: its experts are not merged while they train.
  """
  step, layout, state = _begun(trainer, steps)
  compiled = trainer.compile(step, layout)
  if not isinstance(compiled, outer_lib.MergingStep):
    raise errors.ConfigError(
      'This trainer merges nothing: give its BranchTrainer an outer merge, '
      'outer=outer.local_sgd(500).'
    )
  return Work(
    f'merge of {len(trainer.experts or ())} experts',
    trainer.mesh,
    (Program(compiled.merge, (state,)),),
    _held(state),
    parameters=sum(spec.size for spec in trainer.specs.values()),
  )


def fresh_state(trainer: trainer_lib.Trainer, *, steps: int = 1000) -> Work:
  """The start of a run: parameters and moments born in their shards."""
  step = trainer.step(steps)
  made = jax.jit(_fresh(trainer, step), out_shardings=trainer.layout(step))
  key = _key(trainer)
  return Work('fresh state', trainer.mesh, (Program(made, (key,)),), {})


def merge(
  method: methods.Merge,
  models: Sequence[typing.SpecTree],
  mesh: jax.sharding.Mesh,
  *,
  base: typing.SpecTree | None = None,
  stats: Sequence[Statistics] = (),
  weights: Sequence[float] | None = None,
  rules: partition.ShardingRules | None = None,
  seed: int = 0,
) -> Work:
  """A merge of models on a mesh, each of them spread over all of it.

  A method that takes each leaf by itself has one program for all leaves of a
  kind (shape, dtype, axes), as the merge of arrays runs; one that looks at the
  whole model has one program.

  Args:
    method: how they are merged.
    models: what each holds; logical axes say how a leaf is spread, one without
      is spread along the longest axis that `data` divides.
    mesh: where.
    base: the common ancestor.
    stats: what each model's statistics hold, for methods that need them.
    weights: one a model.
    rules: `partition.fsdp()` by default.
    seed: of random methods.
  """
  rules = rules or partition.fsdp()
  specs = dict(models[0] if base is None else base)
  merged = in_memory.merged_paths(specs)

  def placed(tree, paths):
    return {path: _placed(tree[path], mesh, rules) for path in paths}

  def arguments(paths):
    known = [
      {p: placed(each[p], each[p]) for p in paths if each.get(p)}
      for each in stats
    ]
    origin = None if base is None else placed(base, paths)
    return [placed(each, paths) for each in models], origin, known

  def program(paths, times):
    axes = {p: names for p in paths if (names := specs[p].axes)}

    given = arguments(paths)
    # Leaves without statistics are averaged by methods that can do without.
    bare = bool(method.needs) and not any(given[2])
    used = mean.linear() if bare else method

    def fn(models, base, stats):
      with partition.rules_of(mesh, rules):
        return in_memory.merge(
          models, used, base=base, weights=weights, axes=axes, seed=seed,
          stats=stats if used.needs else None,
        )  # fmt: skip

    layout = {path: leaf.sharding for path, leaf in given[0][0].items()}
    return Program(jax.jit(fn, out_shardings=layout), given, times)

  kinds: dict[tuple, list[typing.Path]] = {}
  for path in merged:
    spec = specs[path]
    whole = method.has_tree_passes or not method.separable
    known = tuple(sorted(stats[0].get(path, ()))) if stats else ()
    kind = () if whole else (spec.shape, spec.dtype, spec.axes, known)
    kinds.setdefault(kind, []).append(path)
  roles = ('models', 'base', 'statistics')
  held: dict[str, Any] = dict(zip(roles, arguments(merged)))
  return Work(
    f'merge of {len(models)} models',
    mesh,
    tuple(
      program(paths[:1] if kind else paths, len(paths) if kind else 1)
      for kind, paths in kinds.items()
    ),
    held,
    parameters=sum(specs[path].size for path in merged),
  )


def shard_bytes(shapes: Any) -> int:
  """Bytes of a tree of placed shapes that one device holds.

  Example:
    >>> mesh = partition.make_mesh(devices=jax.devices()[:1])
    >>> shape = jax.ShapeDtypeStruct(
    ...   (2, 3), 'float32', sharding=partition.replicated(mesh))
    >>> shard_bytes({'w': shape})
    24
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(shapes)
  )


def _begun(trainer, steps):
  """`(step, layout, shapes of the state)` of a run."""
  step = trainer.step(steps)
  layout = trainer.layout(step)
  state = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    jax.eval_shape(_fresh(trainer, step), _key(trainer)),
    layout,
  )
  return step, layout, state


def _held(state):
  """What a state consists of, by role."""
  return {
    'parameters': state.params,
    'optimizer': state.opt_state,
    'rest of the state': [state.step, state.key, state.extras],
  }


def _fresh(trainer, step) -> Callable[[jax.Array], Any]:
  return lambda key: trainer.expand(step.init(trainer.family.init(key), key))


def _key(trainer):
  shape = jax.eval_shape(lambda: jax.random.key(0))
  return jax.ShapeDtypeStruct(
    shape.shape, shape.dtype, sharding=partition.replicated(trainer.mesh)
  )


def _rows(trainer, name, shape, length):
  """One array of a batch, its rows spread over the mesh."""
  mesh, rules = trainer.mesh, trainer.rules
  batches.check_rows(f'{name} of a batch', shape[-1], mesh, rules)
  axes = (*trainer.lead, 'batch')
  if length is not None:
    shape, axes = (*shape, length), (*axes, None)
  layout = partition.sharding(mesh, axes, shape, rules.activations)
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)


def _placed(spec, mesh, rules):
  axes = spec.axes
  if axes is None:
    axes: list[str | None] = [None] * len(spec.shape)
    slices = mesh.shape['data']
    fits = [i for i, n in enumerate(spec.shape) if n % slices == 0]
    if fits:
      axes[max(fits, key=lambda i: spec.shape[i])] = 'embed'
  layout = partition.sharding(mesh, axes, spec.shape, rules.params)
  return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=layout)
