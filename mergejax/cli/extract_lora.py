# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax extract-lora MODEL BASE OUT --rank R`: differences as adapters."""

from collections.abc import Sequence

from mergejax.checkpoints.peft import extract
from mergejax.cli import common
from mergejax.models import architectures


def main(arguments: Sequence[str]) -> None:
  """Writes the adapter and prints what it misses."""
  parser = common.parser(
    'extract-lora',
    'Write the best adapter of a given rank for MODEL - BASE, in PEFT format.',
  )
  parser.add_argument('model')
  parser.add_argument('base')
  parser.add_argument('out', help='a directory to create')
  parser.add_argument('--rank', type=int, required=True)
  parser.add_argument(
    '--match',
    default=extract.KERNELS,
    help='regular expression of the kernels; by default all matrices but '
    'embeddings and the head',
  )
  parser.add_argument(
    '--dtype', default='float32', choices=('float32', 'bfloat16', 'float16')
  )
  options = parser.parse_args(arguments)
  remarks = architectures.check_checkpoints(
    [options.base, options.model],
    'Their difference is no adapter of either.',
  )
  for remark in remarks:
    print(remark)
  residuals, missed = extract.extract_lora(
    options.model,
    options.base,
    options.out,
    rank=options.rank,
    match=options.match,
    dtype=options.dtype,
    progress=lambda r: print(
      f'{r.path}  rank {r.rank}  residual {r.share:.4f}'
    ),
  )
  mean = sum(r.share for r in residuals) / len(residuals)
  print(f'{options.out}: {len(residuals)} kernels, mean residual {mean:.4f}')
  if missed:
    print(f'not in the adapter, though they differ: {len(missed)} parameters')
    for path in missed[:10]:
      print(f'  {path}')
