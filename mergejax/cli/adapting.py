# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train` with an adapter: what is trained, and what is written."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from mergejax import adapters
from mergejax import models
from mergejax import partition
from mergejax.adapters import changes
from mergejax.adapters import tensors
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import typing
from mergejax.training import optim


def adapted(
  module: nn.Module | models.ModelFamily,
  adapter: adapters.Adapter | None,
  restore: str,
  begins_from: adapters.Start | None = None,
  checkpoint_path: os.PathLike | str | None = None,
) -> Any:
  """The module as it is, or the family of it with an adapter.

  Args:
    module: the model.
    adapter: what is trained; None trains the model.
    restore: 'params' or 'state'.
    begins_from: what gives the adapter's first leaves.
    checkpoint_path: of the base; None is a fresh one.

  Raises:
    ConfigError: the moments of another run are asked for; the adapter does not
      fit the model; it is to begin from one of a base that is not given.
  """
  if begins_from is not None and (adapter is None or checkpoint_path is None):
    raise errors.ConfigError(
      'adapter_start begins an adapter from another one of the same base: give '
      'adapter (ADAPTER) and initial_checkpoint (INITIAL_CHECKPOINT) too.'
    )
  if adapter is None:
    return module
  if restore == 'state':
    raise errors.ConfigError(
      "restore='state' takes the moments of a model's parameters, but an adapter "
      "is trained, which has none there: set restore='params'."
    )
  return adapters.adapt(module, adapter)


def begun(
  family: adapters.Adapted,
  begins_from: adapters.Start | None,
  given: Mapping[str, Any],
  key: jax.Array,
) -> dict[str, Any]:
  """Arguments of `Trainer.fit`, the base's parameters joined by the adapter's.

  Args:
    family: from `adapted`.
    begins_from: what gives the adapter's first leaves; fresh ones by default.
    given: arguments of the base's; without `params` the run goes on.
    key: of fresh leaves.
  """
  if 'params' not in given:
    return dict(given)
  base = given['params']
  if begins_from is None:
    return {**given, 'params': family.start(base, key)}
  leaves = begins_from(family, base, key)
  return {**given, 'params': family.joined(base, leaves)}


def check_tasks(family: adapters.Adapted, names: Sequence[str]) -> None:
  """Raises if an adapter has no place for a task; says which is which number.

  Args:
    family: from `adapted`.
    names: of the tasks of the data, in the order of their numbers.
  """
  reads = family.adapter.reads
  if not reads:
    return
  numbers = np.arange(len(names), dtype=np.int32)
  family.adapter.check_batch(
    dict.fromkeys(reads, numbers), f'{len(names)} tasks ({errors.some(names)})'
  )
  if jax.process_index() == 0:
    told = ', '.join(f'{i} {name}' for i, name in enumerate(names))
    print(f'{" and ".join(reads)}: {told}', file=sys.stderr)


def optimizer_of(
  family: Any,
  optimizer: optax.GradientTransformation,
  router: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
  """The optimizer of an adapter, whose router may have one of its own.

  Args:
    family: from `adapted`.
    optimizer: of what is routed.
    router: of what routes, see `optim.by_group`; None has none of its own.

  Raises:
    ConfigError: a router's is given, and nothing routes.
  """
  if router is None:
    return optimizer
  groups = family.groups if isinstance(family, adapters.Adapted) else {}
  if 'router' not in groups.values():
    raise errors.ConfigError(
      'router_optimizer is for what decides how much of which skill or prompt is '
      'used, and this run trains nothing of the kind: leave it out.'
    )
  given = {'adapter': optimizer, 'router': router}
  return optim.by_group(
    groups, {n: each for n, each in given.items() if n in groups.values()}
  )


def export(
  directory: pathlib.Path,
  family: adapters.Adapted,
  params: typing.Tree,
  base: os.PathLike | str | None,
  tasks: Sequence[str],
) -> None:
  """Writes the adapter of a run, in PEFT's files if they have such a one.

  Of one of several tasks each task's own too, where PEFT has such files: a
  library in `adapters`, by the tasks' names.

  Args:
    directory: of the run; `adapter` in it, and `adapters`, are replaced.
    family: from `adapted`.
    params: of the adapted model.
    base: what it began from.
    tasks: names of the tasks of the data, in the order of their numbers.
  """
  if jax.process_count() > 1:
    params = partition.to_host(params)
  if jax.process_index() != 0:
    return
  name = None if base is None else os.fspath(base)
  path = directory / 'adapter'
  plain, own = family.split(params)
  if adapters.has_layout(family.adapter):
    named = tasks if family.adapter.reads else None
    adapters.save(
      path, family, params, base_name=name, tasks=named, overwrite=True
    )
  else:
    _save_own(path, family, plain, own, tasks, name)
  if family.adapter.reads:
    _save_each(directory / 'adapters', family, plain, own, tasks, name)


def _save_own(path, family, plain, own, tasks, name):
  """In files of our own, what PEFT has none for."""
  axes = {p: spec.axes for p, spec in family.adapter_specs.items()}
  about = {
    'base': tensors.fingerprint(family.plain, plain),
    'name': name,
    'kind': type(family.adapter).__name__.lower(),
    **({'tasks': list(tasks)} if family.adapter.reads else {}),
  }
  with files.atomic_path(path, overwrite=True) as temporary:
    checkpoint.save_checkpoint(temporary, own, axes=axes)
    (temporary / changes.BESIDE).write_text(json.dumps(about, indent=2) + '\n')


def _save_each(path, family, plain, own, tasks, name):
  """The adapter of every task by itself, if PEFT has files for it."""
  made = [
    family.adapter.alone(family.base_specs, own, number)
    for number in range(len(tasks))
  ]
  if not all(adapters.has_layout(adapter) for adapter, _ in made):
    return
  with files.atomic_path(path, overwrite=True) as temporary:
    temporary.mkdir()
    for task, (adapter, leaves) in zip(tasks, made):
      alone = adapters.adapt(family.plain, adapter)
      joined = alone.joined(plain, leaves)
      adapters.save(temporary / task, alone, joined, base_name=name)
