# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test class only `make test-all` runs."""

import re

import pytest


def slow(*patterns):
  """Marks cases of a parameterized class, by regular expressions of their names.

  Of a promise that several cases keep one stays; `pytest.mark.slow` on a method
  would mark them all.
  """

  def mark(cls):
    for pattern in patterns:
      names = [
        name
        for name in vars(cls)
        if name.startswith('test') and re.fullmatch(pattern, name)
      ]
      assert names, f'{cls.__name__} has no case {pattern}.'
      for name in names:
        pytest.mark.slow(vars(cls)[name])
    return cls

  return mark
