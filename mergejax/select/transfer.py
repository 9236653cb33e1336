# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LEEP, NCE and H-score: how well a model's outputs fit a task's labels."""

from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import labels as labels_lib


def leep(probabilities: Any, labels: Any) -> float:
  """Log expected empirical prediction; at most 0, higher is better.

  `mean_i ln sum_z p(t_i | z) P[i, z]` with `p(y | z)` from the joint
  frequencies of label and source class.

  Args:
    probabilities: <float>[N, source classes], rows that sum to 1.
    labels: <int>[N] from 0.

  Returns:
    The score. Source classes without any mass are dropped; the released code
    gives NaN for them.

  Raises:
    UserError: rows that are no probabilities (logits, for example), labels that
      do not fit.

  Example:
    >>> leep(np.eye(2), [0, 1])
    0.0

  Source: Nguyen et al., "LEEP" (2020), https://arxiv.org/abs/2002.12462,
  equation 2.
  """
  given = np.asarray(probabilities, np.float64)
  labels = labels_lib.check_classes(labels)
  if given.ndim != 2 or len(given) != len(labels) or not len(labels):
    raise errors.DataError(
      f'{list(given.shape)} probabilities for {len(labels)} labels: one row '
      'for each label.'
    )
  if not np.isfinite(given).all():
    raise errors.DataError('Some probabilities are not finite.')
  if not (given >= 0).all() or not np.allclose(given.sum(axis=1), 1, atol=1e-3):
    raise errors.DataError(
      'Rows of probabilities must be 0 or above and sum to 1. These look like '
      'logits: take their softmax first.'
    )
  one_hot = np.eye(labels.max() + 1)[labels]
  joint = one_hot.T @ given / len(labels)  # [classes, source classes]
  mass = joint.sum(axis=0)
  known = mass > 0
  conditional = joint[:, known] / mass[known]
  expected = (conditional[labels] * given[:, known]).sum(axis=1)
  return float(np.log(expected).mean())


def nce(source_labels: Any, labels: Any) -> float:
  """Negative conditional entropy `-H(t | s)`; at most 0, higher is better.

  Args:
    source_labels: <int>[N], the class that a source model predicts.
    labels: <int>[N] from 0.

  Returns:
    `sum_{y, z} p(y, z) ln p(y | z)` with `0 ln 0 = 0`; the released code adds
    1e-20 inside the logarithm.

  Example:
    >>> nce([0, 0, 1], [0, 0, 1])
    0.0

  Source: Tran et al., "Transferability and hardness of supervised
  classification tasks" (2019), https://arxiv.org/abs/1908.08142, equation 5.
  """
  source = labels_lib.check_classes(source_labels)
  labels = labels_lib.check_classes(labels)
  if len(source) != len(labels) or not len(labels):
    raise errors.DataError(
      f'{len(source)} source labels for {len(labels)} labels: one for each.'
    )
  joint = np.zeros((labels.max() + 1, source.max() + 1))
  np.add.at(joint, (labels, source), 1 / len(labels))
  mass = np.broadcast_to(joint.sum(axis=0), joint.shape)
  there = joint > 0
  return float((joint[there] * np.log(joint[there] / mass[there])).sum()) + 0.0


def h_score(features: Any, labels: Any, *, shrinkage: float = 0.0) -> float:
  """`tr(cov(F)^+ cov(E[F | y]))`: between-class over total spread.

  Args:
    features: <float>[N, D].
    labels: <int>[N] from 0.
    shrinkage: in [0, 1], moves `cov(F)` towards `tr(cov) / D I`; 0 is the
      published score, which overfits when N is not far above D.

  Returns:
    The score, 0 or above; higher is better.

  Raises:
    UserError: labels or features that do not fit, shrinkage outside [0, 1].

  Source: Bao et al., "An information-theoretic approach to transferability in
  task transfer learning" (2019), equation 4; Ibrahim et al. (2022),
  https://arxiv.org/abs/2110.06893, for the shrinkage.
  """
  features = np.asarray(features, np.float64)
  labels = labels_lib.check_classes(labels)
  fits = features.ndim == 2 and len(features) == len(labels)
  if not fits or len(labels) < 2 or not features.size:
    raise errors.DataError(
      f'{list(features.shape)} features for {len(labels)} labels: one row for '
      'each label, and at least two.'
    )
  if not np.isfinite(features).all():
    raise errors.DataError('Some features are not finite.')
  if not 0 <= shrinkage <= 1:
    raise errors.ConfigError(f'shrinkage must be in [0, 1], not {shrinkage}.')
  # The score does not depend on the scale; squares of huge numbers do.
  features = features / (np.abs(features).max() or 1.0)
  centred = features - features.mean(axis=0)
  covariance = centred.T @ centred / len(labels)
  size = len(covariance)
  covariance = (1 - shrinkage) * covariance
  covariance += shrinkage * np.trace(covariance) / size * np.eye(size)
  between = np.zeros_like(covariance)
  for label in np.unique(labels):
    own = centred[labels == label]
    mean = own.mean(axis=0)
    between += len(own) / len(labels) * np.outer(mean, mean)
  inverse = np.linalg.pinv(covariance, rcond=1e-12, hermitian=True)
  return float(np.trace(inverse @ between))
