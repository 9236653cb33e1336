# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax quickstart`: experts, or sparse models, on text that is here."""

from collections.abc import Sequence

from mergejax.cli import common
from mergejax.cli import train
from mergejax.core import errors

# Size of the model -> run in gin/runs.
_RUNS = {
  'tiny': 'branch_train_merge',
  'small': 'branch_train_merge_small',
}


def main(arguments: Sequence[str]) -> None:
  """Runs `gin/runs/branch_train_merge.gin`, its larger sister, or MoE's."""
  parser = common.parser(
    'quickstart',
    'Train experts on text that every machine with Python has, merge them, '
    'and report.',
  )
  parser.add_argument(
    '--out', help='folder of the results; quickstart, or quickstart_moe'
  )
  parser.add_argument(
    '--size',
    default='tiny',
    choices=tuple(_RUNS),
    help='tiny takes minutes on two cores, small about an hour',
  )
  parser.add_argument(
    '--moe', action='store_true',
    help='instead, sparse models against a dense one: Switch, upcycling, '
    'Branch-Train-MiX',
  )  # fmt: skip
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(arguments)
  if options.moe and options.size != 'tiny':
    raise errors.ConfigError(
      '--moe is of the tiny size: of others, `mergejax train '
      '--gin_file=gin/runs/dense_and_sparse.gin --gin_file=gin/models/...`.'
    )
  run = 'dense_and_sparse' if options.moe else _RUNS[options.size]
  out = options.out or ('quickstart_moe' if options.moe else 'quickstart')
  train.main(
    [
      f'--gin_file=runs/{run}.gin',
      '--gin.CORPORA=None',
      f'--gin.MODEL_DIR={out!r}',
      f'--gin.SEED={options.seed}',
    ]
  )
