# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs and shows what it says."""

import doctest
import importlib
import pathlib

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


if __name__ == '__main__':
  absltest.main()
