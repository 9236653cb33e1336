# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters of one base brought together, for both drivers of a merge."""

from collections.abc import Mapping, Sequence
import os

from mergejax import adapters as adapters_lib
from mergejax import models
from mergejax.adapters import changes
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.checkpoints.peft import fold
from mergejax.core import errors


def gather(
  stores: Sequence[store_base.ParamStore | None],
  base: store_base.ParamStore | os.PathLike | str | None,
  base_name: str = 'the base',
) -> store_base.ParamStore | None:
  """What adapters are merged against, once they are known to fit each other.

  Args:
    stores: adapters, as `ChangeStore`; they get each other's leaves.
    base: the path of the base model; or an adapter that all of them were begun
      from, which is then what they differ from; None compares nothing.
    base_name: how messages call the base.

  Returns:
    The store that stands for the base; None where no adapter is neutral and none
    was given.

  Raises:
    StructureError: something among them is no adapter, they do not fit, or
      the base is neither path nor adapter.
    CheckpointError: an adapter of another base.
  """
  own = []
  for store in stores:
    if not isinstance(store, changes.ChangeStore):
      raise errors.StructureError(
        f'{getattr(store, "name", "a tree")} is no adapter, and the others are: '
        'models are merged with models, and adapters with adapters. Fold the '
        'adapters into their base: `model: BASE+ADAPTER`.'
      )
    own.append(store)
  if isinstance(base, changes.ChangeStore):
    changes.together([base, *own], base_name)
    return base
  if not (base is None or isinstance(base, (str, os.PathLike))):
    raise errors.StructureError(
      'The base that adapters were trained on is compared with what they tell of '
      f'it: give its path, not a {type(base).__name__}, or leave it out.'
    )
  neutral = changes.together(own, base_name)
  if base is not None:
    for one in own:
      check_fits(one, base)
  return neutral


def check_base(
  adapters: Mapping[str, str | None], base: os.PathLike | str
) -> None:
  """Refuses adapters that were trained on another base.

  Those that do not tell their base pass. The base is known by its numbers as
  they are stored, or by those that `load_model` makes of them.

  Args:
    adapters: `{name: fingerprint of its base, None if it is not told}`.
    base: path of the base.

  Raises:
    CheckpointError: the base has another fingerprint than an adapter tells.
  """
  told = {mark: name for name, mark in adapters.items() if mark is not None}
  if not told:
    return
  found = [fingerprints.fingerprint(checkpoint.open_weights(base))]
  if not told.keys() <= set(found) and models.is_converted(base):
    found.append(fingerprints.fingerprint(models.load_model(base)[1]))
  for mark, name in told.items():
    if mark not in found:
      raise errors.CheckpointError(
        f'{name} was trained on another base than {base} (fingerprint {mark}, '
        f'not {found[-1]}): what it changes means nothing there. Give the base '
        'it was trained on.'
      )


def check_fits(adapter: changes.ChangeStore, base: os.PathLike | str) -> None:
  """Refuses an adapter of another base, or of modules that its base has not.

  Raises:
    UserError: see `check_base` and `fold_into`.
  """
  check_base({adapter.name: adapter.base}, base)
  store = checkpoint.open_weights(base)
  by_module = all('/' not in path for path in store.specs())
  # A prompt has no module; names of T5X are known with a configuration only.
  if adapter.kind != 'PROMPT_TUNING' and (by_module or _has_our_names(base)):
    _fold(store, base, adapter.name)


def fold_into(
  store: store_base.ParamStore, base: str, adapter: str
) -> store_base.ParamStore:
  """A base with an adapter folded in, whichever names it has.

  Args:
    store: the base.
    base: its path.
    adapter: directory of the adapter.

  Raises:
    UserError: an adapter of another base, or one that cannot be folded.
  """
  check_base({adapter: changes.base_of(adapter)}, base)
  return _fold(store, base, adapter)


def _fold(store, base, adapter):
  if _has_our_names(base):
    return adapters_lib.FoldedStore(store, base, adapter)
  return fold.AdapterStore(store, adapter)


def _has_our_names(base):
  """Whether a checkpoint is of a family here, under the family's own names."""
  config = checkpoint.read_config(base)
  return (
    config is not None
    and config.get('model_type') in models.names()
    and models.conversion(config) is None
  )


def no_start(name: str, kind: str) -> errors.ConfigError:
  """What to raise where a method needs a base and adapters have no neutral."""
  return errors.ConfigError(
    f'{name} works on differences from a base, and no {kind} changes nothing. '
    'Give the adapter that all were begun from as the base (in Python '
    '`base=mj.adapters.ChangeStore(PATH)`), or take a method that averages, such '
    'as linear.'
  )
