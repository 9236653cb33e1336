# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Labels of classes, checked."""

from typing import Any

import numpy as np

from mergejax.core import errors


def check_classes(labels: Any, classes: int | None = None) -> np.ndarray:
  """Labels as integers from 0, checked.

  Raises:
    UserError: labels that are no whole numbers, negative, or beyond `classes`.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise errors.DataError(
      f'Labels must be whole numbers, one a sample, not {labels.dtype} '
      f'{list(labels.shape)}.'
    )
  if len(labels) and labels.min() < 0:
    raise errors.DataError(
      f'Labels are numbered from 0; {int(labels.min())} is not one.'
    )
  if classes is not None and len(labels) and labels.max() >= classes:
    raise errors.DataError(
      f'Label {int(labels.max())} is outside the range: there are {classes} '
      f'classes, 0 to {classes - 1}.'
    )
  return labels
