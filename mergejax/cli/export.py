# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax export CHECKPOINT OUT`: decoding, for a server without mergejax."""

from collections.abc import Sequence

from mergejax import partition
from mergejax.cli import common
from mergejax.cli import decoding_flags
from mergejax.cli import loaded
from mergejax.core import files
from mergejax.evaluation import serving


def _parser():
  parser = common.parser(
    'export',
    'Write a folder that answers without mergejax: a StableHLO program that '
    'jax.export serialised, the parameters as safetensors, and a manifest. '
    'TensorFlow is not needed, and no SavedModel is written.',
  )
  parser.add_argument(
    'checkpoint', help='a checkpoint with its config.json, or a recipe (.yaml)'
  )
  parser.add_argument('out', help='the folder to create')
  parser.add_argument(
    '--input_length', type=int, default=64,
    help='tokens of a row of inputs, the end token included',
  )  # fmt: skip
  parser.add_argument(
    '--length', type=int, default=64, help='most tokens of an answer'
  )
  parser.add_argument(
    '--batch_size', type=int, help='rows of a batch; left open by default'
  )
  parser.add_argument(
    '--platforms', default='cpu,cuda,tpu',
    help=f'what it can run on: {", ".join(serving.PLATFORMS)}',
  )  # fmt: skip
  parser.add_argument(
    '--mesh',
    help='the devices it runs on, none of which need be here: data=2,model=4 '
    'spreads rows over 2 and parameters over 4; one device by default',
  )
  parser.add_argument(
    '--dtype', default='float32', choices=loaded.DTYPES, help='of parameters'
  )
  parser.add_argument(
    '--vocabulary', default='bytes', help='or a .model file, which is copied'
  )
  parser.add_argument(
    '--prefix', action='store_true',
    help='a decoder-only model was trained on tasks, see `mergejax infer`',
  )  # fmt: skip
  decoding_flags.add(parser)
  return parser


def main(arguments: Sequence[str]) -> None:
  """Writes the folder, and says how it is called."""
  options = _parser().parse_args(arguments)
  method = decoding_flags.method_of(options)
  sizes = common.mesh_sizes(options.mesh)
  mesh = None if sizes is None else partition.abstract_mesh(**sizes)
  files.check_new(options.out)
  family, params = loaded.load(options.checkpoint, dtype=options.dtype)
  decoding_flags.check(family, options)
  manifest = serving.export_decoder(
    family,
    params,
    options.out,
    input_length=options.input_length,
    length=options.length,
    batch_size=options.batch_size,
    method=method,
    prefix=options.prefix,
    platforms=options.platforms.split(','),
    vocabulary=options.vocabulary,
    mesh=mesh,
  )
  shapes = ', '.join(
    f'{name} {manifest["outputs"][name]["shape"]}'
    for name in manifest['outputs']
  )
  on = f', on {manifest["devices"]} devices' if manifest['devices'] > 1 else ''
  print(
    f'{options.out}: {manifest["program"]} for '
    f'{", ".join(manifest["platforms"])}{on}, called with '
    f'({", ".join(manifest["call"])}), inputs {manifest["inputs"]["shape"]}: '
    f'{shapes}'
  )
