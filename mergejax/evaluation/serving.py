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
_VERSION = 1


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
) -> dict[str, Any]:
  """Writes a folder that serves a model without us; see the module.

  The program has the cache of decoding inside. Its shapes are fixed but for the
  number of rows, which stays open: jax compiles it once for every number that
  it is called with. It is of one device. No weight is in it.

  Args:
    model: a module whose family decodes, or the family.
    params: of the model; they are stored in the dtypes that they have.
    path: of the folder to create.
    input_length: tokens of a row of inputs, the end token included.
    length: see `decoding_function`.
    batch_size: rows of a batch; None leaves it open.
    method: see `decoding_function`.
    end: likewise.
    prefix: likewise.
    platforms: of `PLATFORMS`, what the program can run on; none of them need
      be here.
    vocabulary: 'bytes', or the .model file, which is copied into the folder.

  Returns:
    The manifest.

  Raises:
    UserError: a model that does not decode, an unknown platform, a file that
      is missing, or the folder exists.
  """
  errors.check_whole('input_length', input_length)
  if batch_size is not None:
    errors.check_whole('batch_size', batch_size)
  for platform in platforms:
    if platform not in PLATFORMS:
      raise errors.ConfigError(errors.near(platform, PLATFORMS, 'platform'))
  files.check_new(path)
  source = _vocabulary_file(vocabulary)
  function = decoding_function(
    model, length=length, method=method, end=end, prefix=prefix
  )
  leaves = tree.flatten(params)
  given = [
    {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()
    },
    jax.ShapeDtypeStruct((_rows(batch_size), input_length), jnp.int32),
  ]
  if method.draws:
    given.append(jax.ShapeDtypeStruct((), jnp.uint32))
  try:
    exporting = jax_export.export(jax.jit(function), platforms=tuple(platforms))
    program = exporting(*given)
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
      'mergejax_export': _VERSION,
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


def _rows(batch_size):
  """A number, or a name that stands for any."""
  return batch_size or jax_export.symbolic_shape('batch')[0]


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
