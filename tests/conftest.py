# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Eight fake devices, strict promotion, warnings as errors."""

import os
import pathlib
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from absl import flags  # noqa: E402  (after the flags of XLA)
import jax  # noqa: E402
import pytest  # noqa: E402

flags.FLAGS.mark_as_parsed()
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """Longest first; warnings are errors, but for those of other packages."""
  items.sort(key=lambda item: 'resume_test' not in item.nodeid)
  for item in items:
    item.add_marker(pytest.mark.filterwarnings('error'))
    for module in ('tensorflow', 'seqio', 'orbax', 'tensorboard', 'google'):
      item.add_marker(
        pytest.mark.filterwarnings(f'ignore:::{module}.*'), append=True
      )
