# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax convert SRC DST`: a checkpoint in another format or naming."""

from collections.abc import Sequence
import dataclasses
import pathlib

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree


def _axes(options, destination, store):
  """The axes that the source knows, if the destination has place for them."""
  npz = destination.suffix == '.npz' or options.format == 'npz'
  if options.names is not None or npz:
    return None
  return store.axes() or None


def _renamed(names, leaves, config):
  """`(leaves, config.json or None)` by other names."""
  ways = {}
  for name in models.names():
    for other, way in models.family_class(name).conversions.items():
      ways[name], ways[other] = ('read', name, way), ('write', name, way)
  if names not in ways:
    raise errors.ConfigError(errors.near(names, ways, 'naming'))
  direction, model_type, way = ways[names]
  if direction == 'read':
    leaves = way.read(leaves, config or {})
    if config is not None:
      config = dict(model_type=model_type, **way.read_config(config))
    return leaves, config
  if config is not None:
    fields = dataclasses.asdict(models.build(config).config)
    config = way.write_config(fields)
  return way.write(leaves), config


def main(arguments: Sequence[str]) -> None:
  """Copies all parameters, bit for bit, and `config.json` where it fits."""
  parser = common.parser('convert', 'Copy a checkpoint into another format.')
  parser.add_argument('source')
  parser.add_argument('destination')
  parser.add_argument(
    '--format',
    help=f'one of {", ".join(checkpoint.FORMATS)}; by default what the '
    'suffix of the destination says',
  )
  parser.add_argument(
    '--names',
    help='rename the parameters: t5x from Hugging Face names of T5, hf-t5 the '
    'other way',
  )
  options = parser.parse_args(arguments)
  if options.format is not None and options.format not in checkpoint.FORMATS:
    raise errors.ConfigError(
      errors.near(options.format, checkpoint.FORMATS, 'checkpoint format')
    )
  destination = pathlib.Path(options.destination)
  files.check_new(destination)
  store = checkpoint.open_checkpoint(options.source)
  leaves = tree.flatten(store.read())
  config = checkpoint.read_config(options.source)
  if options.names is not None:
    leaves, config = _renamed(options.names, leaves, config)
  notes = []
  if store.provenance.get('left_out'):
    notes.append(f'not copied: {", ".join(store.provenance["left_out"])}')
  if destination.suffix in ('.safetensors', '.npz') and config is not None:
    notes.append(
      'config.json is not written: a single file has no place for it'
    )
    config = None
  elif options.names is not None and config is None:
    notes.append(
      f'config.json is not written: {options.source} has none that says how '
      'many heads there are and whether the head is the embedding'
    )
  checkpoint.save_checkpoint(
    destination, leaves, format=options.format, config=config,
    axes=_axes(options, destination, store),
  )  # fmt: skip
  print('\n'.join([f'{destination}: {len(leaves)} arrays', *notes]))
