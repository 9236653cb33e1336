# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding exported for a server that has jax, and nothing of ours.

A folder holds a StableHLO program as `jax.export` serialises it, the
parameters in safetensors, and a manifest that says how to call it:

    import jax, json, numpy, pathlib, safetensors

    folder = pathlib.Path('served')
    manifest = json.loads((folder / 'manifest.json').read_text())
    program = jax.export.deserialize(
      bytearray((folder / manifest['program']).read_bytes())
    )
    said = manifest['parameters']
    params = jax.device_put({
      name: numpy.frombuffer(x['data'], jax.numpy.dtype(said[name]['dtype']))
      .reshape(x['shape'])
      for name, x in safetensors.deserialize(
        (folder / manifest['params']).read_bytes()
      )
    })
    inputs = numpy.zeros((8, manifest['inputs']['shape'][1]), 'int32')
    ...  # the tokens of every row, ended, then 0
    found = jax.jit(program.call)(params, inputs)
    found['tokens'], found['scores']  # [8, answers, length], [8, answers]

A program for several devices says how its arguments lie on them, and the
manifest which mesh they are: docs/serving.md.

Nothing in it is pickled, and nothing is executed but the program. jax promises
to run it for six months of its own versions after the one that wrote it.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import flax.linen as nn
import jax
from jax import export as jax_export
import jax.numpy as jnp

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing
from mergejax.evaluation import decode
from mergejax.evaluation import positions
from mergejax.evaluation import texts

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
PROGRAM, PARAMS, MANIFEST = (
  'decode.jax_export',
  'params.safetensors',
  'manifest.json',
)
# Of the manifest; another number means other names in it.
VERSION = 1


def decoding_function(
  model: nn.Module | models.ModelFamily,
  *,
  length: int,
  method: positions.Method = decode.GREEDY,
  end: int = decode.END,
  prefix: bool = False,
) -> Callable[..., dict[str, jax.Array]]:
  """Decoding as one function of arrays; traceable.

  Args:
    model: a module whose family decodes, or the family.
    length: most tokens of an answer, the end token included.
    method: `sampling.Sample` or `beam.Beam`.
    end: the token after which an answer stops.
    prefix: see `texts.batch_of`.

  Returns:
    `({path: parameter}, <int32>[rows, width] inputs) -> {'tokens':
    <int32>[rows, answers, length], 'scores': <float32>[rows, answers]}`, with
    a third argument, `<uint32>[]` seed, where answers are drawn. Answers stand
    from best to worst, samples in the order of their draws. A row of inputs
    that is 0 throughout only fills the batch, and has empty answers.

  Raises:
    ConfigError: a model that does not decode.
  """
  errors.check_whole('length', length)
  family = models.family_of(model)
  positions.check_decodes(family)
  best_last = method.best != 0

  def answers(params, inputs, seed=None):
    batch = texts.as_batch(
      family, inputs, jnp.any(inputs > 0, axis=1), prefix=prefix
    )
    ready = positions.prepare(
      family, tree.unflatten(params), batch, length=length,
      answers=method.answers,
    )  # fmt: skip
    key = None if seed is None else jax.random.key(seed)
    tokens, scores = method.decode(ready, end=end, key=key)
    order = slice(None, None, -1 if best_last else 1)
    return {'tokens': tokens[:, order], 'scores': scores[:, order]}

  if method.draws:
    return answers
  return lambda params, inputs: answers(params, inputs)


def export_decoder(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  path: os.PathLike | str,
  *,
  input_length: int,
  length: int,
  batch_size: int | None = None,
  method: positions.Method = decode.GREEDY,
  end: int = decode.END,
  prefix: bool = False,
  platforms: Sequence[str] = ('cpu', 'cuda', 'tpu'),
  vocabulary: os.PathLike | str = 'bytes',
  mesh: partition.AnyMesh | None = None,
) -> dict[str, Any]:
  """Writes a folder that serves a model without us; see the module.

  The program has the cache of decoding inside. Its shapes are fixed but for the
  number of rows, which stays open: jax compiles it once for every number that
  it is called with. No weight is in it.

  It is of one device, or of as many as a mesh has: rows are spread over `data`,
  parameters by `partition.standard()`, and answers are whole on every device.

  Args:
    model: a module whose family decodes, or the family.
    params: of the model; they are stored in the dtypes that they have.
    path: of the folder to create.
    input_length: tokens of a row of inputs, the end token included.
    length: see `decoding_function`.
    batch_size: rows of a batch, a multiple of the mesh's `data`; None leaves
      open which.
    method: see `decoding_function`.
    end: likewise.
    prefix: likewise.
    platforms: of `PLATFORMS`, what the program can run on; none of them need
      be here.
    vocabulary: 'bytes', or the .model file, which is copied into the folder.
    mesh: of the devices that the program runs on, none of which need be here,
      see `partition.abstract_mesh`; one device by default.

  Returns:
    The manifest.

  Raises:
    UserError: a model that does not decode, an unknown platform, a file that
      is missing, rows that do not divide over the mesh, or the folder exists.
  """
  errors.check_whole('input_length', input_length)
  if batch_size is not None:
    errors.check_whole('batch_size', batch_size)
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.ConfigError(errors.near(platform, PLATFORMS, 'platform'))
  family = models.family_of(model)
  slices = _slices(mesh, batch_size)
  files.check_new(path)
  source = _vocabulary_file(vocabulary)
  function = decoding_function(
    family, length=length, method=method, end=end, prefix=prefix
  )
  leaves = tree.flatten(params)
  given = [
    {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()
    },
    jax.ShapeDtypeStruct((_rows(batch_size, slices), input_length), jnp.int32),
  ]
  if method.draws:
    given.append(jax.ShapeDtypeStruct((), jnp.uint32))
  jitted = _laid_out(function, family, given, mesh)
  try:
    program = jax_export.export(jitted, platforms=tuple(platforms))(*given)
  except TypeError as error:
    if batch_size is not None or '_DimExpr' not in str(error):
      raise
    raise errors.ConfigError(
      'This model asks how many rows a batch has, as a number: give a '
      'batch_size, or let its family take `x.shape[0]` where it takes `len(x)`.'
    ) from error
  with files.atomic_path(path) as folder:
    folder.mkdir()
    (folder / PROGRAM).write_bytes(program.serialize())
    checkpoint.save_checkpoint(folder / PARAMS, leaves)
    manifest = {
      'mergejax_export': VERSION,
      'devices': program.nr_devices,
      'mesh': {} if mesh is None else dict(mesh.shape),
      **_calling(program, method, end),
      'decoding': {
        'method': type(method).__name__.lower(),
        **_options(method),
        'prefix': prefix,
      },
      'vocabulary': _copied(source, folder),
      'model': dict(models.describe(model)),
      'sha256': {
        name: checksums.SUMS.of(folder / name) for name in (PROGRAM, PARAMS)
      },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + '\n'
    (folder / MANIFEST).write_text(text, encoding='utf-8')
  return manifest


def _options(method: Any) -> dict[str, Any]:
  """Those of a way to decode; of a stranger's, what it says of itself."""
  if dataclasses.is_dataclass(method) and not isinstance(method, type):
    return dataclasses.asdict(method)
  return {'told': repr(method)}


def _slices(mesh, batch_size):
  """Over how many slices of a mesh rows are spread."""
  if mesh is None:
    return 1
  spread = {axis: size for axis, size in mesh.shape.items() if size > 1}
  if extra := spread.keys() - {'data', 'model', 'expert'}:
    raise errors.ConfigError(
      f'One model answers: its mesh has no {", ".join(extra)}; spread rows over '
      'data, parameters over model.'
    )
  slices = mesh.shape['data'] * mesh.shape['expert']
  if batch_size is not None and batch_size % slices:
    raise errors.ConfigError(
      f'batch_size {batch_size} does not divide over the {slices} slices that '
      'the mesh has for rows (data, and expert).'
    )
  return slices


def _rows(batch_size, slices):
  """A number, or a name that stands for any; of several slices, any multiple."""
  name = 'batch' if slices == 1 else f'{slices}*batch'
  return batch_size or jax_export.symbolic_shape(name)[0]


def _laid_out(function, family, given, mesh):
  """The function jitted, its arguments and results laid out on a mesh."""
  if mesh is None:
    return jax.jit(function)
  rules = partition.standard()
  axes = {name: spec.axes for name, spec in family.specs().items()}
  whole = partition.replicated(mesh)
  params, _, *seed = given
  layout = (
    partition.shardings(mesh, params, axes, rules),
    partition.sharding(mesh, ('batch', None), None, rules.activations),
    *(whole for _ in seed),
  )

  def on_mesh(*arguments):
    with partition.rules_of(mesh, rules):
      return function(*arguments)

  return jax.jit(on_mesh, in_shardings=layout, out_shardings=whole)


def _calling(program, method, end) -> Mapping[str, Any]:
  """How the program is called: names, shapes, dtypes."""

  def told(aval):
    shape = [
      size if isinstance(size, int) else str(size) for size in aval.shape
    ]
    return {'shape': shape, 'dtype': str(aval.dtype)}

  (args, _) = jax.tree.unflatten(program.in_tree, program.in_avals)
  outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
  return {
    'jax': jax.__version__,
    'calling_convention_version': program.calling_convention_version,
    'platforms': list(program.platforms),
    'program': PROGRAM,
    'params': PARAMS,
    'call': ['params', 'inputs', *(['seed'] if method.draws else [])],
    'inputs': {**told(args[1]), 'pad': 0, 'end': end},
    **({'seed': told(args[2])} if method.draws else {}),
    'outputs': {name: told(aval) for name, aval in outputs.items()},
    'parameters': {name: told(aval) for name, aval in args[0].items()},
  }


def _vocabulary_file(vocabulary) -> pathlib.Path | None:
  """The file of a vocabulary that is not bytes."""
  if str(vocabulary) == 'bytes':
    return None
  source = pathlib.Path(vocabulary).expanduser()
  if not source.is_file():
    raise errors.DataError(f'There is no SentencePiece model at {source}.')
  return source


def _copied(source, folder):
  """What the manifest says of the vocabulary; a file is copied beside."""
  if source is None:
    return {'name': 'bytes'}
  shutil.copyfile(source, folder / source.name)
  return {'name': source.name, 'sha256': checksums.SUMS.of(source)}
