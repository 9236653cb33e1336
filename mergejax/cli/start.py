# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a run starts from: fresh, from parameters, or where another stopped."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax

from mergejax import models
from mergejax.checkpoints import assignment
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.core import errors
from mergejax.core import typing
from mergejax.models import architectures
from mergejax.training import checkpoints
from mergejax.training import trainer as trainer_lib

RESTORE = ('params', 'state')


@dataclasses.dataclass(frozen=True)
class Start:
  """What a run starts from; one that goes on in its folder only compares it.

  Attributes:
    checkpoint: any that `models.load_params` reads, or a run's folder; None:
      fresh parameters.
    restore: `'params'`, or `'state'`: the moments and the step number too, of a
      run of T5X with Adafactor, or of one of ours.
    step: of a run's folder; its last by default.
    rules: restore in part, see `models.load_params`.
    fallback_to_scratch: likewise.
    pad_vocabulary: likewise.
  """

  checkpoint: os.PathLike | str | None
  restore: str = 'params'
  step: int | None = None
  rules: assignment.Rules | None = None
  fallback_to_scratch: bool = False
  pad_vocabulary: bool = False

  def __post_init__(self):
    if self.restore not in RESTORE:
      raise errors.ConfigError(
        errors.near(self.restore, RESTORE, 'value of restore')
      )
    assignment.check_rules(self.rules or ())
    changed = self.described()
    if self.checkpoint is None and changed:
      raise errors.ConfigError(
        f'{", ".join(changed)} say how to start from a checkpoint, but there is '
        'no initial_checkpoint.'
      )
    partly = changed.keys() - {'restore', 'restore_step'}
    if self.restore == 'state' and partly:
      raise errors.ConfigError(
        f"restore='state' takes a checkpoint whole, so that "
        f'{", ".join(sorted(partly))} cannot be given: moments belong to the '
        "parameters as they are. Use restore='params'."
      )
    if self.checkpoint is not None:
      place = checkpoint.at_step(self.checkpoint, self.step)
      object.__setattr__(self, 'checkpoint', place)

  def described(self) -> dict[str, Any]:
    """The settings that are not as usual, as plain data."""
    found = {
      'restore': self.restore if self.restore != 'params' else None,
      'restore_step': self.step,
      'restore_rules': self.rules and [list(rule) for rule in self.rules],
      'fallback_to_scratch': self.fallback_to_scratch or None,
      'pad_vocabulary': self.pad_vocabulary or None,
    }
    return {name: value for name, value in found.items() if value is not None}

  def check(self, module: Any) -> 'Begin':
    """Finds the parameters, and checks that the module computes with them.

    A checkpoint without `config.json` says nothing of what it computes; one
    that is restored by rules need not compute the same.

    Returns:
      What begins the run.

    Raises:
      UserError: the checkpoint is of another model.
    """
    path = self.checkpoint
    if path is None:
      return Begin(None, None, '')
    if self.rules is None and checkpoint.read_config(path) is not None:
      architectures.check(
        {
          'the configured module': models.describe(module),
          str(path): models.describe(models.load_module(path)),
        },
        'Configure the module as the checkpoint was trained.',
        # Tables are copied to every layer, or must be alike.
        ignored=('relative_per_layer',),
      )
    fit = models.fit_params(
      path,
      module,
      rules=self.rules,
      fallback_to_scratch=self.fallback_to_scratch,
      pad_vocabulary=self.pad_vocabulary,
    )
    store = None
    if self.restore == 'state':
      store = checkpoint.open_state(path)
    return Begin(fit.read, store, _partly(fit, path))

  def fingerprint(self) -> str | None:
    """Of the checkpoint's weights; None for fresh parameters."""
    if self.checkpoint is None:
      return None
    return fingerprints.fingerprint(checkpoint.open_checkpoint(self.checkpoint))


def _partly(fit, path):
  """What a restore in part leaves out, as a sentence; '' for a whole one."""
  parts = []
  if fit.fresh:
    parts.append(f'{len(fit.fresh)} begin fresh ({errors.some(fit.fresh)})')
  if fit.left:
    parts.append(f'{len(fit.left)} stay there ({errors.some(fit.left)})')
  return f'{path} is restored in part: {"; ".join(parts)}.' if parts else ''


class Begin(NamedTuple):
  """What begins a run.

  Attributes:
    read: `(key) -> parameters`; None: fresh ones.
    store: of the moments and the step number; None: of step 0, without any.
    partly: what is not restored, as a sentence; empty: nothing.
  """

  read: Callable[[jax.Array], typing.Tree] | None
  store: store_base.ParamStore | None
  partly: str

  def arguments(
    self,
    trainer: trainer_lib.Trainer,
    steps: int,
    key: jax.Array,
    directory: pathlib.Path | None = None,
  ) -> dict[str, Any]:
    """What `trainer.fit` begins with: nothing, `params` or `state`.

    The first process prints what is not restored.

    Args:
      trainer: of the run.
      steps: the step number to reach.
      key: of the run.
      directory: of the run; one that goes on begins with nothing.
    """
    goes_on = directory is not None and checkpoints.has_steps(
      directory / 'checkpoints'
    )
    if self.read is None or goes_on:
      return {}
    if self.partly and jax.process_index() == 0:
      print(self.partly, file=sys.stderr)
    params = self.read(key)
    if self.store is None:
      return {'params': params}
    return {'state': trainer.begin(steps, params, key, self.store)}
