# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Opens any checkpoint by looking at it, and saves one whole or not at all."""

from collections.abc import Mapping
import json
import os
import pathlib
import re
from typing import Any

import numpy as np

from mergejax.checkpoints import axes_file
from mergejax.checkpoints import base
from mergejax.checkpoints import npz
from mergejax.checkpoints import orbax
from mergejax.checkpoints import quantised
from mergejax.checkpoints import safetensors
from mergejax.checkpoints import shards
from mergejax.checkpoints import states
from mergejax.checkpoints import t5x
from mergejax.checkpoints import t5x_writing
from mergejax.checkpoints import ties
from mergejax.checkpoints import vocabulary
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.names import known

FORMATS = ('orbax', 'safetensors', 'npz', 't5x')
CONFIG = 'config.json'


def open_checkpoint(path: os.PathLike | str) -> base.ParamStore:
  """Opens a checkpoint, whatever its format, by reading headers only.

  Args:
    path: an orbax or T5X tree, step or run folder; a `.safetensors` file; a Hugging
      Face directory, sharded or not; a `.npz` archive.

  Returns:
    A store with `specs()`, `read(...)`, `tied` and `provenance`.

  Raises:
    UserError: nothing is there (near names are offered), the format is not
      known, or the headers are damaged.

  Example:
    >>> save_checkpoint('/tmp/doc.npz', {'w': np.zeros(2)}, overwrite=True)
    >>> open_checkpoint('/tmp/doc.npz').specs()['w'].shape
    (2,)
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise errors.CheckpointError(_missing(path))
  store = _opened(path)
  return axes_file.attach(store, _stored_axes(path, store))


def _opened(path):
  if path.suffix == '.npz' and path.is_file():
    return _without_optimizer(npz.NpzStore(path))
  if shards.is_here(path):
    store = safetensors.SafetensorsStore(path)
    config = read_config(path)
    store.tied = ties.tied(store.specs(), config)
    store.quantised = quantised.scheme(store.specs(), config)
    return _without_optimizer(store)
  if orbax.locate(path) is not None:
    return orbax.OrbaxStore(path)
  if t5x.locate(path) is not None:
    return t5x.T5xStore(path)
  raise errors.CheckpointError(_unknown(path))


def _stored_axes(path, store):
  """Axes from beside the weights, else what the names of the family tell."""
  places = [path]
  item = None if shards.is_here(path) else orbax.locate(path)
  if item not in (None, path):  # of a step, or of the last step of a run
    places = [item, item.parent, path]
  elif item is None and store.provenance['format'] == 't5x':
    file = t5x.locate(path)  # in the last step of a run, likewise
    places = [path if file is None else file.parent, path]
  for place in places:
    found = axes_file.find(place)
    if found:
      return found
  config = read_config(path)
  return known.axes(store.specs(), config) if config else {}


def _without_optimizer(store):
  """The parameters of a training state that was flattened into one file."""
  specs = store.specs()
  if not any('/' in path for path in specs):
    return store
  found = states.parameters(tree_lib.unflatten(specs), store.name)
  if not found.left_out:
    return store
  store.provenance['left_out'] = found.left_out
  return vocabulary.AliasStore(store, found.paths, hidden=specs)


def open_weights(path: os.PathLike | str) -> base.ParamStore:
  """Opens a checkpoint whose arrays are its weights, to merge or train them.

  Args:
    path: as in `open_checkpoint`.

  Returns:
    The store.

  Raises:
    UserError: as `open_checkpoint`, or the checkpoint is quantised.
  """
  store = open_checkpoint(path)
  quantised.check(store)
  return store


def open_state(path: os.PathLike | str) -> base.ParamStore:
  """Opens all of a training state: parameters, moments and the step number.

  Args:
    path: a step, or a run's folder of steps, of T5X (orbax or not) or of ours.

  Returns:
    A store with the names that are stored: of T5X `target/...`, `state/step`
    and `state/param_states/PARAMETER/v_row`; of ours `params/...`,
    `opt_state/...` and `step`.

  Raises:
    CheckpointError: nothing is there, or a format that holds weights alone.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise errors.CheckpointError(_missing(path))
  if orbax.locate(path) is not None:
    return orbax.OrbaxStore(path, whole=True)
  if t5x.locate(path) is not None:
    return t5x.T5xStore(path, whole=True)
  raise errors.CheckpointError(
    f'{path} is no checkpoint of a training run: moments and step numbers are '
    'in those of T5X and in the folders of our runs (checkpoints/STEP).'
  )


# Where the steps of a run lie: T5X's and ours, in a run's or a job's folder.
_STEPS = ('', 'checkpoints', 'train/checkpoints')
_STEP = re.compile(r'(?:[A-Za-z]\w*_)?(\d+)')


def at_step(path: os.PathLike | str, step: int | None = None) -> pathlib.Path:
  """The checkpoint of a step of a run.

  Args:
    path: a run's folder, of T5X (`checkpoint_STEP`) or of ours
      (`checkpoints/STEP`); any other checkpoint if `step` is None.
    step: its number, which may be 0; None: `path` itself if it is a
      checkpoint, else the last step.

  Raises:
    CheckpointError: the run has no such step (those that it has are listed).

  Example:
    >>> save_checkpoint('/tmp/run/checkpoint_0', {'w': np.zeros(2)}, overwrite=True)
    >>> at_step('/tmp/run', 0).name
    'checkpoint_0'
  """
  path = pathlib.Path(path).expanduser()
  found: dict[int, pathlib.Path] = {}
  for place in _STEPS if path.is_dir() else ():
    for child in (path / place).glob('*'):
      match = _STEP.fullmatch(child.name)
      if match and (orbax.locate(child) or t5x.locate(child)) is not None:
        found.setdefault(int(match[1]), child)
  if step is None:
    below = (orbax.locate(path) or t5x.locate(path)) if path.exists() else path
    alone = below is not None or shards.is_here(path) or not found
    return path if alone else found[max(found)]
  if step not in found:
    if not path.exists():
      raise errors.CheckpointError(_missing(path))
    steps = ', '.join(map(str, sorted(found))) or 'no step of a run'
    raise errors.CheckpointError(
      f'{path} has no checkpoint of step {step}: it has {steps}. Name the '
      "run's folder, which holds checkpoint_STEP (T5X) or checkpoints/STEP."
    )
  return found[step]


def _missing(path):
  text = f'There is no checkpoint at {path}.'
  if path.parent.is_dir():
    names = [child.name for child in path.parent.iterdir()]
    if names:
      return text + f' {path.parent} holds: {", ".join(sorted(names)[:20])}.'
    return text + f' {path.parent} is empty.'
  return text + f' {path.parent} does not exist either.'


def _unknown(path):
  if path.suffix == '.gguf' or any(path.glob('*.gguf')):
    return (
      f'{path} is in GGUF, whose weights are mostly quantised. Merge the models '
      'that it was made from, or load it with transformers: '
      "`AutoModelForCausalLM.from_pretrained(DIR, gguf_file='NAME.gguf')"
      '.save_pretrained(NEW)`.'
    )
  known = (
    'Known: an orbax or T5X checkpoint, a .safetensors file, a Hugging Face '
    'directory with .safetensors files, a .npz archive.'
  )
  pickles = [path] if path.is_file() else list(path.iterdir())
  pickles = [
    p.name for p in pickles if p.suffix in ('.bin', '.pt', '.pth', '.pkl')
  ]
  if pickles:
    return (
      f'{path} holds {pickles[0]}, a pickle, which can run code when loaded '
      'and is never read. Convert it to safetensors where it came from: '
      '`model.save_pretrained(DIR, safe_serialization=True)`.'
    )
  return f'{path} is not a checkpoint of a known format. {known}'


def save_checkpoint(
  path: os.PathLike | str,
  tree: typing.Tree,
  format: str | None = None,  # pylint: disable=redefined-builtin
  *,
  config: Mapping[str, Any] | None = None,
  axes: axes_lib.Rules | None = None,
  overwrite: bool = False,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Saves a tree of parameters; a reader sees all of it or nothing.

  Args:
    path: a file (`.safetensors`, `.npz`) or directory to create.
    tree: nested dicts of arrays, or `{path: array}`.
    format: `'orbax'`, `'safetensors'`, `'npz'` or `'t5x'`; by default what the suffix
      of `path` says, else orbax.
    config: written as `config.json` beside the weights of a directory; see
      `load_model`.
    axes: logical axes of parameters, `{path: names}` or rules, written beside
      them, so that merges know stacked layers from one parameter; by default
      those of the family that `config` names, if its names are known. A `.npz`
      file has no place for them.
    overwrite: replace what stands at `path` once the new one is complete.
    max_shard_bytes: size of the shards of a safetensors directory.

  Raises:
    UserError: unknown format, `path` exists, a leaf that the format cannot
      hold, or the disk is full.
  """
  path = pathlib.Path(path).expanduser()
  format = format or {'.safetensors': 'safetensors', '.npz': 'npz'}.get(
    path.suffix, 'orbax'
  )
  if format not in FORMATS:
    raise errors.ConfigError(errors.near(format, FORMATS, 'checkpoint format'))
  leaves = tree_lib.flatten(tree)
  specs = tree_lib.specs(leaves)  # refuses what is no array of numbers
  single_file = path.suffix == f'.{format}' or format == 'npz'
  if single_file and config is not None:
    raise errors.ConfigError(
      f'{path} is a single file and has no place for config.json; give a '
      'directory name instead.'
    )
  if format == 'npz' and axes:
    raise errors.CheckpointError(
      f'{path} is a NumPy archive, which has no place for logical axes: save in '
      'another format, or leave `axes` out.'
    )
  if axes is None:
    named = known.axes(specs, config) if config else {}
  else:
    named = axes_file.checked(specs, axes)
  with files.atomic_path(path, overwrite=overwrite) as temporary:
    if format == 'orbax':
      orbax.write(temporary, leaves)
    elif format == 't5x':
      t5x_writing.write(temporary, leaves)
    else:
      host = {name: _native(leaf) for name, leaf in leaves.items()}
      if format == 'npz':
        npz.write(temporary, host)
      elif single_file:
        safetensors.write(temporary, host, named)
      else:
        safetensors.write_sharded(temporary, host, max_shard_bytes)
    if config is not None:
      (temporary / CONFIG).write_text(json.dumps(dict(config), indent=2) + '\n')
    if named and not single_file:
      (temporary / axes_file.NAME).write_text(axes_file.text(named))


def _native(leaf):
  """A NumPy array in this machine's byte order, which files are read in."""
  leaf = np.asarray(leaf)
  return leaf.astype(leaf.dtype.newbyteorder('='), copy=False)


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    UserError: the file does not hold one.
  """
  try:
    data = json.loads(file.read_text(encoding='utf-8'))
  except ValueError as error:
    raise errors.CheckpointError(f'{file} is not JSON: {error}.') from error
  if not isinstance(data, dict):
    raise errors.CheckpointError(
      f'{file} should hold a JSON object of settings.'
    )
  return data


def read_config(path: os.PathLike | str) -> dict[str, Any] | None:
  """The `config.json` beside a checkpoint, or None if there is none."""
  file = pathlib.Path(path).expanduser() / CONFIG
  return read_json(file) if file.is_file() else None
