# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax convert SRC DST`: a checkpoint in another format or naming."""

from collections.abc import Sequence
import dataclasses
import pathlib

from mergejax import models
from mergejax.checkpoints import base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.names import t5
from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import tree


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
    choices=('t5x', 'hf-t5'),
    help='rename a T5: t5x from Hugging Face names, hf-t5 the other way',
  )
  options = parser.parse_args(arguments)
  if options.format is not None and options.format not in checkpoint.FORMATS:
    raise errors.ConfigError(
      errors.near(options.format, checkpoint.FORMATS, 'checkpoint format')
    )
  destination = pathlib.Path(options.destination)
  base.check_new(destination)
  store = checkpoint.open_checkpoint(options.source)
  leaves = tree.flatten(store.read())
  config = checkpoint.read_config(options.source)
  if options.names == 't5x':
    leaves = t5.from_hf(leaves, tied_head=t5.has_tied_head(config or {}))
    if config is not None:
      config = dict(model_type='t5x', **t5.config_from_hf(config))
  elif options.names == 'hf-t5':
    leaves = t5.to_hf(leaves)
    if config is not None:
      module = models.build(config)
      config = t5.config_to_hf(dataclasses.asdict(module.config))
  notes = []
  if store.provenance.get('left_out'):
    notes.append(f'not copied: {", ".join(store.provenance["left_out"])}')
  if destination.suffix in ('.safetensors', '.npz') and config is not None:
    notes.append(
      'config.json is not written: a single file has no place for it'
    )
    config = None
  elif options.names == 'hf-t5' and config is None:
    notes.append(
      f'config.json is not written: {options.source} has none that says how '
      'many heads there are and whether the head is the embedding'
    )
  checkpoint.save_checkpoint(
    destination, leaves, format=options.format, config=config
  )
  print('\n'.join([f'{destination}: {len(leaves)} arrays', *notes]))
