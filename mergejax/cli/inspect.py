# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax inspect CKPT`: what a checkpoint holds, from its headers."""

from collections.abc import Sequence
import dataclasses
import json

from mergejax import adapters
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import fold
from mergejax.cli import common


def main(arguments: Sequence[str]) -> None:
  """Prints path, dtype and shape of every parameter, and totals."""
  parser = common.parser('inspect', 'List the parameters of a checkpoint.')
  parser.add_argument('checkpoint')
  parser.add_argument('--json', action='store_true', help='for programs')
  options = parser.parse_args(arguments)
  if fold.is_adapter(options.checkpoint):
    _tell_adapter(options.checkpoint, options.json)
    return
  store = checkpoint.open_checkpoint(options.checkpoint)
  specs = store.specs()
  left_out = store.provenance.get('left_out', [])
  about = {
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
  if store.quantised:
    print(
      f'quantised ({store.quantised}): these are codes and scales, which are '
      'not merged as they are'
    )
  if left_out:
    print(f'not taken, but there too: {", ".join(left_out)}')


def _tell_adapter(path, as_json):
  """Says of an adapter its kind, base, rank, and how many numbers it has."""
  card = adapters.card(path)
  print(json.dumps(dataclasses.asdict(card)) if as_json else card)
