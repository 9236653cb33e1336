# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ladders that are collected once, kept on disk and trained from.

The backbone of a ladder does not learn: what it says of a batch is the same at
every epoch. A batch that brings its ladders is trained on without a layer of the
backbone at work.
"""

from collections.abc import Iterable, Iterator, Mapping
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import base as base_lib
from mergejax.adapters import ladders
from mergejax.adapters import one_by_one
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.checkpoints import safetensors
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing

_ABOUT, _COUNT = 'ladders.json', 'batches'


def collect(
  family: adapted_lib.Adapted, params: typing.Tree, batch: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """What a ladder reads of its backbone, for one batch; the first of two steps.

  The second is any call of the family with `{**batch, **ladders}`: it runs the
  side network and the head alone, and gives the logits that `batch` gives.

  Args:
    family: from `adapt`, of a `ladder`.
    params: of the backbone; the adapter's leaves may be beside them.
    batch: as the model is called with.

  Returns:
    `encoder_ladders <dtype>[batch, kept + 1, inputs, embed]`, the embedded tokens
    and the outputs of the kept layers; `decoder_ladders` likewise; with
    `merge_last` also `decoder_last <dtype>[batch, targets, embed]`.

  Raises:
    ConfigError: no ladder, or one whose backbone drops out.

  Example:
    >>> import mergejax as mj
    >>> module = mj.models.build({'model_type': 't5x', 'vocab_size': 9,
    ...   'emb_dim': 8, 'num_heads': 2, 'head_dim': 4, 'mlp_dim': 16,
    ...   'num_encoder_layers': 1, 'num_decoder_layers': 1})
    >>> family = mj.adapters.adapt(module, mj.adapters.ladder(reduction=2))
    >>> params, batch = family.init(jax.random.key(0)), family.example_batch(3)
    >>> found = jax.jit(lambda p, b: collect(family, p, b))(params, batch)
    >>> found['encoder_ladders'].shape
    (3, 2, 1, 8)

  Source: see `ladder`.
  """
  adapter = _ladder_of(family)
  call = base_lib.Call(family.plain, family.base_specs, {}, batch)
  return adapter.collect(call, family.plain.variables(params))


def save_ladders(
  path: os.PathLike | str,
  family: adapted_lib.Adapted,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
) -> None:
  """Writes batches with their ladders into a folder, for `load_ladders`.

  A folder that is there is continued: what it has of the same batches stays as it
  is, so that an interrupted call is called again.

  Args:
    path: the folder; `ladders.json` and a safetensors file for every batch.
    family: see `collect`.
    params: of the backbone; the adapter's leaves may be beside them.
    batches: arrays in host memory, in the order in which they are trained on.
      They take `kept + 1` times their tokens times embed numbers a stack.

  Raises:
    ConfigError: see `collect`.
    CheckpointError: the folder has ladders of another base, of other layers, or
      of other batches.
  """
  folder, about = pathlib.Path(path), _about(family, params)
  if (folder / _ABOUT).exists():
    _check_about(folder, about)
  compiled = jax.jit(lambda params, batch: collect(family, params, batch))
  count = 0
  # Without a count the folder is not whole.
  _write_about(folder, about)
  for batch in batches:
    batch = {name: np.asarray(x) for name, x in batch.items()}
    file = _file(folder, count)
    if file.exists():
      _check_batch(file, batch)
    else:
      found = compiled(params, batch)
      leaves = {**batch, **{name: np.asarray(x) for name, x in found.items()}}
      with files.atomic_path(file) as temporary:
        safetensors.write(temporary, leaves)
    count += 1
  _write_about(folder, {**about, _COUNT: count})


def load_ladders(
  path: os.PathLike | str,
  family: adapted_lib.Adapted,
  params: typing.Tree,
) -> Iterator[dict[str, np.ndarray]]:
  """The batches of `save_ladders`, with their ladders, once through.

  Args:
    path: the folder.
    family: the one that trains.
    params: of the backbone, to be compared.

  Returns:
    An iterator of batches.

  Raises:
    CheckpointError: no ladders, or those of another base or of other layers.
  """
  folder = pathlib.Path(path)
  if not (folder / _ABOUT).exists():
    raise errors.CheckpointError(
      f'{path} has no {_ABOUT}: it is no folder that save_ladders wrote.'
    )
  _check_about(folder, _about(family, params))
  count = checkpoint.read_json(folder / _ABOUT).get(_COUNT)
  missing = [i for i in range(count or 0) if not _file(folder, i).exists()]
  if count is None or missing:
    raise errors.CheckpointError(
      f'{path} is not whole: the call of save_ladders that wrote it did not end, '
      'or files were removed. Call it again with the same batches: it continues.'
    )
  return (_read(_file(folder, number)) for number in range(count))


def _read(file, names=None):
  store = checkpoint.open_checkpoint(file)
  names = [*store.specs()] if names is None else names
  return {name: np.asarray(x) for name, x in store.leaves(names).items()}


def _check_batch(file, batch):
  """Raises unless the ladders in a file are those of a batch."""
  there = [*checkpoint.open_checkpoint(file).specs()]
  found = _read(file, [name for name in batch if name in there])
  if {*batch} != {*found} or any(
    not np.array_equal(x, found[n]) for n, x in batch.items()
  ):
    raise errors.CheckpointError(
      f'{file} has the ladders of another batch than the one given in its place: '
      f'give the batches of the call that began {file.parent}, or another folder.'
    )


def _write_about(folder, about):
  with files.atomic_path(folder / _ABOUT, overwrite=True) as temporary:
    temporary.write_text(json.dumps(about, indent=2) + '\n')


def _file(folder, number):
  return folder / f'batch-{number:06d}.safetensors'


def _ladder_of(family: adapted_lib.Adapted) -> ladders.Ladder:
  adapter = getattr(family, 'adapter', None)
  if not isinstance(adapter, ladders.Ladder):
    raise errors.ConfigError(
      f'Ladders are collected for a model with a ladder, adapt(model, ladder()), '
      f'not for {type(adapter or family).__name__}.'
    )
  if adapter.backbone_dropout:
    raise errors.ConfigError(
      'The ladders of a backbone that drops out differ from step to step: to '
      'collect them set backbone_dropout=False.'
    )
  return adapter


def _about(family, params) -> dict[str, Any]:
  """What ladders depend on, as it is kept beside them."""
  adapter = _ladder_of(family)
  leaves = tree.flatten(params)
  base = {path: leaves[path] for path in family.base_specs}
  return {
    'base': fingerprints.fingerprint(
      one_by_one.leaves(family.base_specs, base)
    ),
    'dtype': family.plain.config.dtype,
    'encoder_layers': [*adapter.kept(family.base_specs, 'encoder')],
    'decoder_layers': [*adapter.kept(family.base_specs, 'decoder')],
    'merge_last': adapter.merge_last,
  }


def _check_about(folder, about):
  found = checkpoint.read_json(folder / _ABOUT)
  wrong = [name for name in about if found.get(name) != about[name]]
  if wrong:
    told = '; '.join(f'{n} {found.get(n)}, not {about[n]}' for n in wrong)
    raise errors.CheckpointError(
      f'The ladders in {folder} are of another model: {told}. Take the base and '
      'the layers they were collected with, or collect anew into another folder.'
    )
