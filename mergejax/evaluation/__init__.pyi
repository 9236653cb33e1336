# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.evaluation import expert_table
from mergejax.evaluation import metrics
from mergejax.evaluation import plots
from mergejax.evaluation import report
from mergejax.evaluation import suite
from mergejax.evaluation.base import Evaluator
from mergejax.evaluation.base import Metric
from mergejax.evaluation.base import Score
from mergejax.evaluation.base import Table
from mergejax.evaluation.beam import Beam
from mergejax.evaluation.decode import make_decoder
from mergejax.evaluation.ranked import rank_evaluator
from mergejax.evaluation.sampling import Sample
from mergejax.evaluation.scoring import Suite
from mergejax.evaluation.scoring import Task
from mergejax.evaluation.served import open_exported
from mergejax.evaluation.serving import export_decoder

__all__ = [
  'Beam',
  'Evaluator',
  'Metric',
  'Sample',
  'Score',
  'Suite',
  'Table',
  'Task',
  'expert_table',
  'export_decoder',
  'make_decoder',
  'metrics',
  'open_exported',
  'plots',
  'rank_evaluator',
  'report',
  'suite',
]
