# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax quickstart`: Branch-Train-Merge on text that this machine has."""

from collections.abc import Sequence

from mergejax.run import common
from mergejax.run import train


def main(arguments: Sequence[str]) -> None:
  """Runs `gin/runs/quickstart.gin` with a model of the chosen size."""
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
    choices=('tiny', 'small'),
    help='tiny takes minutes on two cores, small about an hour',
  )
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(arguments)
  train.main(
    [
      '--gin_file=runs/branch_train_merge.gin',
      f'--gin_file=models/lm_{options.size}.gin',
      '--gin.CORPORA=None',
      f'--gin.MODEL_DIR={options.out!r}',
      f'--gin.SEED={options.seed}',
    ]
  )
