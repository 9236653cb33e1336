# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of training batches in host memory, before a device sees them.

A compiled program cannot refuse a token that the model has no row for: it
would train on, with a number that is wrong or none. A minimum and a maximum of
a batch cost microseconds here.
"""

from collections.abc import Callable, Mapping
import sys
from typing import Any, TextIO

import flax.linen as nn
import numpy as np

from mergejax import models


def checker(
  module: nn.Module,
  source: str = 'the data',
  *,
  stacked: bool = False,
  stream: TextIO | None = None,
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
  """A function that checks a batch and gives it back.

  Args:
    module: the model, for its `vocab_size`, or its `classes`.
    source: where the batches come from, for the messages.
    stacked: batches have a leading axis of experts.
    stream: where to say that a batch held nothing to learn from, once; standard
      error by default.

  Returns:
    `check(batch) -> batch`. It raises a `UserError` for a token or a label that
    the model does not know.

  Example:
    >>> check = checker(models.build({'model_type': 'lm', 'vocab_size': 5}))
    >>> batch = {'decoder_input_tokens': np.array([[0, 3]]),
    ...          'decoder_target_tokens': np.array([[3, 1]])}
    >>> check(batch) is batch
    True
  """
  models.describe(module)
  told = False

  def check(batch):
    nonlocal told
    models.check_batch(module, batch, source)
    if not told and _empty(batch, stacked):
      told = True
      print(
        f'A batch of {source} has no token to learn from: it is padding alone. '
        'Such steps change no parameter; this is said once.',
        file=stream or sys.stderr,
      )
    return batch

  return check


def _empty(batch, stacked):
  """Whether there is nothing to learn from, for any of the stacked experts."""
  weights = np.asarray(models.given_weights(batch))
  real = weights.reshape(len(weights) if stacked else 1, -1).any(axis=1)
  return not real.all()
