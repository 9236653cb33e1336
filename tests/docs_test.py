# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs and shows what it says."""

import doctest
import importlib
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import typing
from mergejax.merging import in_memory

PACKAGE = pathlib.Path(in_memory.__file__).parent.parent
MODULES = sorted(
  '.'.join(path.relative_to(PACKAGE.parent).with_suffix('').parts)
  for path in PACKAGE.rglob('*.py')
  if '>>>' in path.read_text()
)


class DocsTest(parameterized.TestCase):
  @parameterized.parameters(*MODULES)
  def test_examples(self, name):
    module = importlib.import_module(name)
    words = dict(jax=jax, jnp=jnp, np=np, typing=typing, merge=in_memory.merge)
    result = doctest.testmod(
      module,
      extraglobs={k: v for k, v in words.items() if k not in dir(module)},
    )
    self.assertGreater(result.attempted, 0)
    self.assertEqual(result.failed, 0)

  def test_your_own_model_in_one_file(self):
    """The program of the README runs, and RegMean knows both tasks."""
    text = (PACKAGE.parent / 'README.md').read_text()
    after = text[text.index('## Your own model, in one file') :]
    program = after.split('```python\n')[1].split('```')[0]
    self.assertLess(len(program.splitlines()), 60)
    done = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True,
      check=True,
    )  # fmt: skip
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    shares = [float(task.split()[1]) for task in rows['regmean'].split(',')]
    self.assertLen(shares, 2)
    self.assertGreater(min(shares), 0.9, rows)
    # Each expert knows its own task alone, or the merge would prove nothing.
    self.assertLess(float(rows['first'].rsplit(maxsplit=1)[1]), 0.5)


if __name__ == '__main__':
  absltest.main()
