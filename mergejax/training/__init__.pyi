# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.training import arrays
from mergejax.training import callbacks
from mergejax.training import choices
from mergejax.training import distillation
from mergejax.training import ladder_gates
from mergejax.training import losses
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import routing_pictures
from mergejax.training import schedules
from mergejax.training import t5x_state
from mergejax.training import transforms
from mergejax.training.arrays import ArrayStream
from mergejax.training.callbacks import Callback
from mergejax.training.choices import t_few
from mergejax.training.objective import cross_entropy
from mergejax.training.peers import watch_peers
from mergejax.training.scoring import evaluate
from mergejax.training.state import TrainState
from mergejax.training.trainer import Trainer
from mergejax.training.transforms import StepTransform
from mergejax.training.transforms import ema
from mergejax.training.transforms import lawa
from mergejax.training.transforms import one_minus_sqrt
from mergejax.training.transforms import polynomial
from mergejax.training.transforms import running
from mergejax.training.transforms import skip_nonfinite
from mergejax.training.transforms import task_metrics

__all__ = [
  'ArrayStream',
  'Callback',
  'StepTransform',
  'TrainState',
  'Trainer',
  'arrays',
  'callbacks',
  'choices',
  'cross_entropy',
  'distillation',
  'ema',
  'evaluate',
  'ladder_gates',
  'lawa',
  'losses',
  'objective',
  'one_minus_sqrt',
  'optim',
  'polynomial',
  'routing_pictures',
  'running',
  'schedules',
  'skip_nonfinite',
  't5x_state',
  't_few',
  'task_metrics',
  'transforms',
  'watch_peers',
]
