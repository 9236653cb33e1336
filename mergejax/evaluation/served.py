# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""An exported folder, opened and asked where we are installed."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import jax
from jax import export as jax_export
import numpy as np

from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.evaluation import serving


class Served:
  """What `serving.export_decoder` wrote, on the devices that it is for.

  Attributes:
    manifest: what the folder says of itself.
  """

  def __init__(
    self, manifest: Mapping[str, Any], program: Any, params: Any, layout: Any
  ):
    """Made by `open_exported`."""
    self.manifest = manifest
    self._params, self._layout = params, layout
    self._call = jax.jit(program.call)

  def __call__(
    self, inputs: typing.Array, seed: int | None = None
  ) -> dict[str, np.ndarray]:
    """Answers a batch.

    Args:
      inputs: `<int32>[rows, width]`, the width and the rows of the manifest,
        each row padded with 0.
      seed: of the draws, for a program that draws.

    Returns:
      `{'tokens': <int32>[rows, answers, length], 'scores': <float32>[rows,
      answers]}`, the best answer first.

    Raises:
      UserError: inputs of another shape; a seed where nothing is drawn, or none
        where something is.
    """
    inputs = np.asarray(inputs, np.int32)
    rows, width = self.manifest['inputs']['shape']
    slices = _slices(rows)
    fits = not len(inputs) % slices if slices else len(inputs) == rows
    if inputs.ndim != 2 or inputs.shape[1] != width or not fits:
      told = f'a multiple of {slices}' if slices else rows
      raise errors.DataError(
        f'This program answers batches of [rows, {width}], rows being {told}; '
        f'these inputs are {list(inputs.shape)}: fill rows and batches with 0.'
      )
    if (seed is not None) != ('seed' in self.manifest['call']):
      raise errors.ConfigError(
        'This program draws its answers: give a seed.' if seed is None
        else 'This program draws nothing: give no seed.'
      )  # fmt: skip
    rest = [inputs, *([] if seed is None else [np.uint32(seed)])]
    found = self._call(self._params, *jax.device_put(rest, self._layout))
    return {name: np.asarray(array) for name, array in found.items()}


def open_exported(
  path: os.PathLike | str, devices: Sequence[Any] | None = None
) -> Served:
  """Opens an exported folder, and puts its parameters on devices.

  Args:
    path: what `mergejax export` wrote.
    devices: as many as the program is for; by default the first ones here.

  Raises:
    UserError: not such a folder, or damaged; the program is for another number
      of devices or another platform.

  Example, after `mergejax export CHECKPOINT served`:

      served = mj.evaluation.open_exported('served')
      served(inputs)['tokens']
  """
  folder = pathlib.Path(path).expanduser()
  manifest = _manifest(folder)
  count = manifest['devices']
  here = list(jax.devices() if devices is None else devices)
  if len(here) < count or (devices is not None and len(here) != count):
    raise errors.ConfigError(
      f'{path} was exported for {count} device{"s" * (count > 1)}, and there '
      f'{"is" if len(here) == 1 else "are"} {len(here)}: export it again with '
      f'a --mesh of {len(here)}.'
    )
  platform = here[0].platform
  # JAX says gpu where its programs say whose.
  names = {'gpu': ('cuda', 'rocm')}.get(platform, (platform,))
  if not set(names) & set(manifest['platforms']):
    raise errors.ConfigError(
      f'{path} was exported for {", ".join(manifest["platforms"])}, and these '
      f'devices are {platform}: export it again with --platforms {names[0]}.'
    )
  file = folder / manifest['program']
  program = jax_export.deserialize(bytearray(file.read_bytes()))
  stored = checkpoint.open_checkpoint(folder / manifest['params'])
  params = tree.flatten(stored.read())
  mesh = partition.make_mesh(devices=here[:count], **manifest['mesh'])
  whole = partition.replicated(mesh)  # a program of one device says nothing
  laid = [each or whole for each in program.in_shardings_jax(mesh)]
  layout, _ = jax.tree.unflatten(program.in_tree, laid)
  params = jax.device_put(params, layout[0])
  return Served(manifest, program, params, list(layout[1:]))


def _manifest(folder):
  """What a folder says of itself; its files are what they were."""
  file = folder / serving.MANIFEST
  try:
    manifest = json.loads(file.read_text(encoding='utf-8'))
    version = manifest['mergejax_export']
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise errors.CheckpointError(
      f'{folder} is not what `mergejax export` writes: no {serving.MANIFEST} of '
      f'its can be read there ({type(error).__name__}: {error}).'
    ) from error
  if version != serving.VERSION:
    raise errors.CheckpointError(
      f'{folder} has version {version} of the form of an exported program; '
      f'known is {serving.VERSION}: export it again.'
    )
  for name, known in manifest['sha256'].items():
    found = (folder / name).is_file() and checksums.SUMS.of(folder / name)
    if found != known:
      raise errors.CheckpointError(
        f'{folder / name} is {"changed" if found else "missing"} since it was '
        'exported: export it again.'
      )
  return manifest


def _slices(rows: int | str) -> int:
  """Of open rows, what they are a multiple of; 0 of rows that are not open."""
  if isinstance(rows, int):
    return 0
  number, times, _ = rows.partition('*')
  return int(number) if times else 1
