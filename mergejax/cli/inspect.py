# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax inspect CKPT`: what a checkpoint holds, from its headers.

Of an adapter also its base, targets and ranks; of a folder of them, of each.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from mergejax import adapters
from mergejax.adapters import saved
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import fold
from mergejax.cli import common
from mergejax.core import errors


def main(arguments: Sequence[str]) -> None:
  """Prints path, dtype and shape of every parameter, and totals."""
  parser = common.parser('inspect', 'List the parameters of a checkpoint.')
  parser.add_argument('checkpoint')
  parser.add_argument('--json', action='store_true', help='for programs')
  options = parser.parse_args(arguments)
  path, about = pathlib.Path(options.checkpoint).expanduser(), {}
  if adapters.is_library(path):
    library = adapters.Library(path)
    cards = {n: dataclasses.asdict(card) for n, card in library.cards.items()}
    print(json.dumps(cards) if options.json else library)
    return
  if fold.is_adapter(path):
    about = {'adapter': _adapter(path)}
    path /= fold.WEIGHTS
  elif saved.is_own(path):
    about = {'adapter': _adapter(path)}
  store = checkpoint.open_checkpoint(path)
  specs = store.specs()
  left_out = store.provenance.get('left_out', [])
  about |= {
    'format': store.provenance['format'],
    'quantised': store.quantised,
    'left_out': list(left_out),
  }
  if options.json:
    rows = {
      path: {'shape': list(spec.shape), 'dtype': spec.dtype.name}
      for path, spec in specs.items()
    }
    print(json.dumps({**about, 'parameters': rows}))
    return
  width = max(map(len, specs), default=0)
  for path, spec in specs.items():
    print(f'{path:<{width}}  {spec.dtype.name:<9} {list(spec.shape)}')
  total = sum(spec.size for spec in specs.values())
  size = sum(spec.nbytes for spec in specs.values())
  print(
    f'{store.provenance["format"]}: {len(specs)} arrays, {total:,} numbers, '
    f'{size / 1e6:,.1f} MB'
  )
  if 'adapter' in about:
    print(about['adapter']['text'])
  if store.quantised:
    print(
      f'quantised ({store.quantised}): these are codes and scales, which are '
      'not merged as they are'
    )
  if left_out:
    print(f'not taken, but there too: {", ".join(left_out)}')


def _adapter(path):
  """What an adapter is, in words, and in numbers for programs."""
  try:
    card = adapters.card(path)
  except errors.CheckpointError as error:
    # A kind that folds into a base, or none that is known.
    return {'text': error.message}
  return {'text': str(card), **dataclasses.asdict(card)}
