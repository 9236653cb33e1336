# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax quickstart`: Branch-Train-Merge on text that this machine has."""

from collections.abc import Sequence

from mergejax.cli import common
from mergejax.cli import train

# Size of the model -> run in gin/runs.
_RUNS = {
  'tiny': 'branch_train_merge',
  'small': 'branch_train_merge_small',
}


def main(arguments: Sequence[str]) -> None:
  """Runs `gin/runs/branch_train_merge.gin`, or its larger sister."""
  parser = common.parser(
    'quickstart',
    'Train experts on text that every machine with Python has, merge them, '
    'and report.',
  )
  parser.add_argument(
    '--out', default='quickstart', help='folder of the results'
  )
  parser.add_argument(
    '--size',
    default='tiny',
    choices=tuple(_RUNS),
    help='tiny takes minutes on two cores, small about an hour',
  )
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(arguments)
  train.main(
    [
      f'--gin_file=runs/{_RUNS[options.size]}.gin',
      '--gin.CORPORA=None',
      f'--gin.MODEL_DIR={options.out!r}',
      f'--gin.SEED={options.seed}',
    ]
  )
