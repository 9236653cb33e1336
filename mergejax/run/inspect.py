# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax inspect CKPT`: what a checkpoint holds, from its headers."""

from collections.abc import Sequence
import json

from mergejax.run import common
from mergejax.store import checkpoint


def main(arguments: Sequence[str]) -> None:
  """Prints path, dtype and shape of every parameter, and totals."""
  parser = common.parser('inspect', 'List the parameters of a checkpoint.')
  parser.add_argument('checkpoint')
  parser.add_argument('--json', action='store_true', help='for programs')
  options = parser.parse_args(arguments)
  store = checkpoint.open_checkpoint(options.checkpoint)
  specs = store.specs()
  if options.json:
    rows = {
      path: {'shape': list(spec.shape), 'dtype': spec.dtype.name}
      for path, spec in specs.items()
    }
    print(
      json.dumps({'format': store.provenance['format'], 'parameters': rows})
    )
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
