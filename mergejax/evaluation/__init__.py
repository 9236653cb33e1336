# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of models on tasks: suites, metrics, tables, reports and plots.

suite = mj.evaluation.suite.load('suite.yaml')
table = suite.table([('base', module, params)], 'test')
print(table.to_text())
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
