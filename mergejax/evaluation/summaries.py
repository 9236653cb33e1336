# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training metrics as TensorBoard events, through clu."""

from collections.abc import Sequence
import os

from clu import metric_writers

from mergejax.training import hooks
from mergejax.training import loop


def tensorboard(
  directory: os.PathLike | str, names: Sequence[str] | None = None
) -> loop.Hook:
  """A hook that writes every metric as a scalar.

  Args:
    directory: where the event files go.
    names: names of the experts, see `hooks.scalars`.
  """
  writer = metric_writers.SummaryWriter(os.fspath(directory))

  def write(step, metrics):
    writer.write_scalars(step, hooks.scalars(metrics, names))
    writer.flush()

  return write
