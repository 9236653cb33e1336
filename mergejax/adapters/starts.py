# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What an adapter begins from: one that was trained before, on other tasks.

A start is called with the adapted family, the base's parameters and a key, and
gives the adapter's leaves. `mergejax train` takes one as `adapter_start`.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import Protocol

import jax
import jax.numpy as jnp

from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import attempts
from mergejax.adapters import base as base_lib
from mergejax.adapters import changes
from mergejax.adapters import low_rank
from mergejax.adapters import prompts
from mergejax.adapters import routes
from mergejax.adapters import saved
from mergejax.adapters import tensors
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

Path = os.PathLike | str


class Start(Protocol):
  """`(family, params of the base, key) -> leaves`; see the module."""

  def __call__(
    self, family: adapted_lib.Adapted, params: typing.Tree, key: jax.Array, /
  ) -> typing.Tree: ...


def _leaves(path, family, params):
  """`{path: array}` of an adapter on disk, of the same base."""
  folder = pathlib.Path(path).expanduser()
  if fold.is_adapter(folder):
    made, own = saved.load(folder, family.plain, params)
    _check_alike(path, made, family)
    return tree.flatten(own)
  expected = changes.base_of(folder)
  if expected is not None:
    found = tensors.fingerprint(family.plain, params)
    if found != expected:
      raise errors.CheckpointError(
        f'{path} was trained on another base (fingerprint {expected}, that of '
        f'the given parameters is {found}): its numbers mean nothing here.'
      )
  return tree.flatten(checkpoint.open_checkpoint(folder).read())


def _check_alike(path, made, family):
  """Raises if the same numbers would mean something else."""
  lora = lambda each: each.expert if isinstance(each, routes.Poly) else each
  ours, theirs = lora(family.adapter), lora(made.adapter)
  if not (
    isinstance(ours, low_rank.Lora) and isinstance(theirs, low_rank.Lora)
  ):
    return
  for site in theirs.sites(family.base_specs):
    scales = [each.scale_at(site.path) for each in (theirs, ours)]
    if abs(scales[0] - scales[1]) > 1e-6 * abs(scales[0]):
      raise errors.ConfigError(
        f'{path} scales its product at {site.path} by {scales[0]:g}, and the '
        f'adapter that begins from it by {scales[1]:g}: set its rank, alpha '
        'and rank_stabilised as they were.'
      )


def _checked(path, leaves, family):
  try:
    base_lib.own_leaves(leaves, family.adapter_specs)
    tree.check_same(
      family.adapter_specs, tree.specs(leaves),
      expected_name='the adapter', given_name=str(path),
    )  # fmt: skip
  except errors.UserError as error:
    raise error.at(path) from error
  return tree.unflatten(leaves)


def _check_tasks(path, leaves, family):
  """Raises for an inventory of skills whose logits are of other tasks."""
  adapter = family.adapter
  if not isinstance(adapter, routes.Poly):
    return
  for place, spec in family.adapter_specs.items():
    if adapter.group(place) != base_lib.ROUTER or place not in leaves:
      continue
    at = (spec.axes or ()).index('tasks')
    had, wanted = leaves[place].shape[at], spec.shape[at]
    if had != wanted:
      raise errors.ConfigError(
        f'{path} has the logits of {had} tasks, and the adapter that begins from '
        f'it is of {wanted}: from_inventory takes the skills and begins the '
        'logits anew.'
      )


@dataclasses.dataclass(frozen=True)
class _Saved:
  path: Path
  new_tasks: bool = False

  def __call__(self, family, params, key):
    leaves = _leaves(self.path, family, params)
    if self.new_tasks:
      group = family.adapter.group
      fresh = tree.flatten(family.adapter.init(family.base_specs, key, params))
      leaves |= {p: x for p, x in fresh.items() if group(p) == base_lib.ROUTER}
    else:
      _check_tasks(self.path, leaves, family)
    return _checked(self.path, leaves, family)


def from_saved(path: Path) -> Start:
  """Begins from an adapter of the same kind and sizes.

  Args:
    path: in PEFT's files, or as `mergejax train` writes other kinds.

  Returns:
    A start. It raises a `UserError` for an adapter of another base, of other
    leaves or shapes, or of another scale.

  Example:
    >>> from_saved('out/adapter').path
    'out/adapter'
  """
  return _Saved(path)


def from_inventory(path: Path) -> Start:
  """Begins from the skills of a `poly`; the tasks' logits are fresh.

  Args:
    path: of a `poly` of as many skills, heads and ranks, of any tasks.

  Returns:
    A start, see `from_saved`.

  Source: Ponti et al. (2022), https://arxiv.org/abs/2202.13914: a new task has
  new logits.
  """
  return _Saved(path, new_tasks=True)


@dataclasses.dataclass(frozen=True)
class _Mean:
  path: Path
  inventory: routes.Poly

  def __call__(self, family, params, key):
    del key
    expected = self.inventory.expert
    if family.adapter != expected:
      raise errors.ConfigError(
        f'The mean of the skills of {self.path} is the adapter {expected}, and '
        f'{family.adapter} is to begin from it: give lora() the rank, alpha and '
        'targets of the inventory.'
      )
    leaves = _leaves(self.path, family, params)
    try:
      mean = self.inventory.collapsed(family.base_specs, tree.unflatten(leaves))
    except errors.UserError as error:
      raise error.at(self.path) from error
    return _checked(self.path, tree.flatten(mean), family)


def from_mean(path: Path, inventory: routes.Poly) -> Start:
  """Poly-mu: a LoRA begins from the mean of all skills.

  Args:
    path: of a saved `poly`.
    inventory: what it is: with its tasks, skills, heads, rank, targets.

  Returns:
    A start of `inventory.expert`, a `lora` of the same rank, alpha and targets.

  Source: Caccia et al. (2022), https://arxiv.org/abs/2211.03831, section 4.
  """
  return _Mean(path, inventory)


def _prompts(paths, family, params):
  """`<float32>[m, embed]` of each folder, one by one."""
  for path in paths:
    leaves = _leaves(path, family, params)
    if {*leaves} != {prompts.TARGET} or leaves[prompts.TARGET].ndim != 2:
      raise errors.DataError(
        f'{path} is no single prompt; sources are prompts that were trained with '
        'prompt(), one a folder.'
      )
    yield leaves[prompts.TARGET]


@dataclasses.dataclass(frozen=True)
class _Prompts:
  paths: tuple[Path, ...]
  sub_network: Path | None

  def __call__(self, family, params, key):
    adapter = family.adapter
    if not isinstance(adapter, attempts.Attempt):
      raise errors.ConfigError(
        'from_prompts gives attempt() its sources; a prompt() begins with '
        'from_spot.'
      )
    given = list(_prompts(self.paths, family, params))
    leaves = tree.flatten(adapter.begin(family.base_specs, key, given))
    if self.sub_network is not None:
      there = _leaves(self.sub_network, family, params)
      wanted = [path for path in leaves if path.startswith('attempt/')]
      lacking = [path for path in wanted if path not in there]
      if lacking:
        raise errors.CheckpointError(
          f'{self.sub_network} is of no attempt(): it lacks '
          f'{errors.some(lacking)}.'
        )
      leaves |= {path: there[path] for path in wanted}
    return _checked(self.sub_network or self.paths[0], leaves, family)


def from_prompts(
  paths: Sequence[Path], sub_network: Path | None = None
) -> Start:
  """ATTEMPT begins from trained prompts: its sources, and its targets' start.

  Args:
    paths: a prompt each; targets begin as the first, the papers' is of MNLI.
    sub_network: of an `attempt` whose attention is taken over, such as one
      trained on the source tasks; fresh by default.

  Returns:
    A start of `attempt`. It raises a `UserError` for prompts of another base,
    shape or number.

  Source: Asai et al. (2022), https://arxiv.org/abs/2205.11961, section 3.
  """
  return _Prompts(tuple(paths), sub_network)


@dataclasses.dataclass(frozen=True)
class _Spot:
  paths: tuple[Path, ...]
  target: Path | None

  def __call__(self, family, params, key):
    del key
    if not isinstance(family.adapter, prompts.Prompt):
      raise errors.ConfigError(
        'from_spot begins a prompt(); the sources of an attempt() are given with '
        'from_prompts.'
      )
    given = list(_prompts(self.paths, family, params))
    target = None
    if self.target is not None:
      (target,) = _prompts([self.target], family, params)
    shape = family.adapter_specs[prompts.TARGET].shape
    begun = prompts.spot(given, target)
    if begun.shape != shape[-2:]:
      raise errors.DataError(
        f'The source prompts are {list(begun.shape)}, and the prompt that begins '
        f'from them is {list(shape[-2:])}: give it their length.'
      )
    return {'prompts': {'target': jnp.broadcast_to(begun, shape)}}


def from_spot(paths: Sequence[Path], target: Path | None = None) -> Start:
  """SPoT: a prompt begins from trained ones, see `spot`.

  Args:
    paths: a prompt each.
    target: a prompt trained a little on the target task; several sources are
      weighed by what they have in common with it.

  Returns:
    A start of `prompt`.

  Source: Vu et al. (2021), https://arxiv.org/abs/2110.07904.
  """
  return _Spot(tuple(paths), target)
