# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of models on tasks: suites, metrics, tables, reports and plots.

suite = mj.evaluation.suite.load('suite.yaml')
table = suite.table([('base', module, params)], 'test')
print(table.to_text())
"""

from mergejax.core import lazy

_PUBLIC = {
  'Evaluator': ('mergejax.evaluation.base', 'Evaluator'),
  'Metric': ('mergejax.evaluation.base', 'Metric'),
  'Score': ('mergejax.evaluation.base', 'Score'),
  'Suite': ('mergejax.evaluation.scoring', 'Suite'),
  'Table': ('mergejax.evaluation.base', 'Table'),
  'Task': ('mergejax.evaluation.scoring', 'Task'),
  'expert_table': ('mergejax.evaluation.expert_table', None),
  'metrics': ('mergejax.evaluation.metrics', None),
  'plots': ('mergejax.evaluation.plots', None),
  'report': ('mergejax.evaluation.report', None),
  'suite': ('mergejax.evaluation.suite', None),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _PUBLIC)
