# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LogME: the evidence that frozen features explain labels."""

import logging
from typing import Any, NamedTuple

import numpy as np

from mergejax.core import errors
from mergejax.core import labels as labels_lib
from mergejax.methods import base as merge_base

VARIANTS = ('jmlr', 'icml')
# Guards of the released code, kept so that its scores are reproduced.
_GUARD = 1e-5


class Evidence(NamedTuple):
  """What maximising the evidence found; C target columns.

  Attributes:
    score: mean over columns of the log evidence per sample.
    alphas: <float64>[C], precision of the weights.
    betas: <float64>[C], precision of the noise.
    means: <float64>[C, D], posterior means of the weights, one row a column.
    converged: <bool>[C].
  """

  score: float
  alphas: np.ndarray
  betas: np.ndarray
  means: np.ndarray
  converged: np.ndarray

  def predict(self, features: Any) -> np.ndarray:
    """`<float64>[N, C]` predictions; their arg-max is the class."""
    return np.asarray(features, np.float64) @ self.means.T


def logme(features: Any, labels: Any, **options: Any) -> float:
  """The LogME score; higher is better. See `evidence` for all it finds.

  Features are divided by their root mean square first, so that models whose
  features differ in scale can be compared: the largest evidence is the same for
  every scale (alpha takes it up), but the guards and the few steps of the
  released code are not. `reference_compat` and 'icml' leave them as they come.

  Args:
    features: <float>[N, D].
    labels: <int>[N] classes, or <float>[N, C] targets of a regression.
    **options: of `evidence`.

  Returns:
    The mean log evidence per sample.

  Example:
    >>> labels = np.array([0, 1] * 8)
    >>> good, noise = np.eye(2)[labels] * 3, np.ones((16, 2))
    >>> logme(good, labels) > logme(noise, labels)
    True
  """
  released = options.get('reference_compat') or options.get('variant') == 'icml'
  if not released:
    features = _rescaled(_checked_features(features))
  return evidence(features, labels, **options).score


def _rescaled(features):
  """Features whose mean square is 1; zeros stay."""
  largest = np.abs(features).max()
  if not largest:
    return features
  features = features / largest  # squares neither over- nor underflow
  return features / np.sqrt(np.mean(features**2))


def evidence(
  features: Any,
  labels: Any,
  *,
  variant: str = 'jmlr',
  reference_compat: bool = False,
  skip_empty: bool = False,
) -> Evidence:
  """Maximises the evidence of Bayesian linear regression, column by column.

  `w ~ N(0, I / alpha)`, `y | w ~ N(F w, I / beta)`;
  `log ev = D/2 ln alpha + N/2 ln beta - 1/2 sum_{i<=D} ln(alpha + beta s_i)
  - beta/2 |y - F m|^2 - alpha/2 |m|^2 - N/2 ln 2 pi` with s the eigenvalues of
  `F^T F`. A fixed point of alpha and beta, at most 11 steps, in float64.

  Args:
    features: <float>[N, D], as they come: neither centred nor scaled.
    labels: <int>[N] classes from 0, each a column of zeros and ones; or
      <float>[N, C].
    variant: 'jmlr'; 'icml' is the earlier algorithm, with a coarser tolerance.
    reference_compat: reproduce the released score of 'jmlr', which leaves out
      the D - k null directions: with fewer samples than features it is too high
      by `(D - k) ln(alpha) / 2N`, and models of different width cannot be
      compared.
    skip_empty: leave out classes that no sample has; they count by default, as
      in the released code.

  Returns:
    Score, precisions and posterior means.

  Raises:
    UserError: labels that are negative or of another number than the features,
      fewer than two samples, features or targets that are not finite or too
      large to be squared.

  Features that are all zero explain nothing; the score is that of noise alone,
  `(ln beta - 1 - ln 2 pi) / 2` with `1 / beta` the mean square of the targets.

  Source: You et al. (2021), https://arxiv.org/abs/2102.11005; You et al., JMLR
  23 (2022), https://arxiv.org/abs/2110.10545, algorithm 3.
  """
  merge_base.check_choice('variant', variant, VARIANTS)
  features, targets = _checked(features, labels)
  empty = ~targets.any(axis=0)
  if empty.any():
    logging.warning(
      'Classes %s have no sample%s.', np.flatnonzero(empty).tolist(),
      '; they are left out' if skip_empty else ', yet they count',
    )  # fmt: skip
    if skip_empty:
      targets = targets[:, ~empty]
  if variant == 'icml':
    found = _icml(features, targets)
  else:
    found = _by_eigenvalues(features, targets, not reference_compat)
  return _finished(*found)


def from_moments(
  gram: Any, products: Any, squares: Any, count: int
) -> Evidence:
  """`evidence` from sums over samples, for streams and meshes.

  Args:
    gram: <float>[D, D], `F^T F`.
    products: <float>[D, C], `F^T Y`.
    squares: <float>[C], `sum y^2` of each column.
    count: samples, N.

  Returns:
    As `evidence` with its defaults.

  Source: the eigenvectors of `F^T F` are the right singular vectors of F.
  """
  gram = np.asarray(gram, np.float64)
  products = np.asarray(products, np.float64)
  squares = np.asarray(squares, np.float64)
  _check_finite('products of features', gram)
  _check_finite('products with targets', products, squares)
  return _finished(*_tall(gram, products, squares, count, True))


def _tall(gram, products, squares, count, exact):
  """From `F^T F` and `F^T Y`: fewer features than samples."""
  eigenvalues, vectors = _spectrum(gram, count)
  turned = vectors.T @ products
  scores, alphas, betas, ratios, converged = _jmlr(
    eigenvalues, turned**2 / eigenvalues[:, None], squares,
    (count, len(gram)), exact=exact,
  )  # fmt: skip
  weights = turned / (ratios[None, :] + eigenvalues[:, None])
  return scores, alphas, betas, (vectors @ weights).T, converged


def _by_eigenvalues(features, targets, exact):
  """By the smaller of `F^T F` and `F F^T`; all columns at once."""
  count, width = features.shape
  squares = (targets**2).sum(axis=0)
  if count > width:
    products = features.T @ targets
    return _tall(features.T @ features, products, squares, count, exact)
  eigenvalues, vectors = _spectrum(features @ features.T, width)
  projected = vectors.T @ targets
  scores, alphas, betas, ratios, converged = _jmlr(
    eigenvalues, projected**2, squares, (count, width), exact=exact
  )
  weights = projected / (ratios[None, :] + eigenvalues[:, None])
  return scores, alphas, betas, (vectors @ weights).T @ features, converged


def _spectrum(matrix, other):
  """Eigenvalues and vectors, without those that rounding leaves for zeros."""
  _check_finite('products of features', matrix)
  eigenvalues, vectors = np.linalg.eigh(matrix)
  least = max(other, len(matrix)) * np.finfo(np.float64).eps
  keep = eigenvalues > max(eigenvalues[-1], 0.0) * least
  return eigenvalues[keep], vectors[:, keep]


def _checked(features, labels):
  features = _checked_features(features)
  labels = np.asarray(labels)
  if labels.ndim == 0 or len(labels) != len(features):
    raise errors.DataError(
      f'{labels.size} labels for {len(features)} samples: one for each.'
    )
  if labels.ndim == 2:
    if labels.dtype.kind not in 'biuf' or not labels.shape[1]:
      raise errors.DataError(
        f'Targets of a regression must be numbers [samples, columns], not '
        f'{labels.dtype} {list(labels.shape)}.'
      )
    targets = labels.astype(np.float64)
    _check_finite('targets', targets)
    return features, targets
  labels = labels_lib.check_classes(labels)
  return features, np.eye(labels.max() + 1)[labels]


def _checked_features(features):
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
    raise errors.DataError(
      'Features must be [samples, width] with at least two samples, not '
      f'{list(features.shape)}.'
    )
  _check_finite('features', features)
  return features


def _check_finite(what, *arrays):
  bad = sum(int((~np.isfinite(array)).sum()) for array in arrays)
  if bad:
    raise errors.DataError(
      f'{bad} of the {what} are not finite: look for such numbers in the data '
      'and in the model, or for numbers too large to be squared.'
    )


def _jmlr(eigenvalues, projected, squares, shape, *, exact):
  """All columns at once: `(scores, alphas, betas, ratios, converged)`."""
  count, width = shape
  if not len(eigenvalues):
    return _noise_alone(squares, count)
  s = eigenvalues[:, None]  # [rank, 1]
  rest = squares - projected.sum(axis=0)  # what no feature explains
  rest = np.maximum(rest, 0.0)
  columns = len(squares)
  alphas, betas = np.ones(columns), np.ones(columns)
  ratios, m2, residual = (np.ones(columns) for _ in range(3))
  active = np.ones(columns, bool)
  for _ in range(11):
    t = alphas / betas
    gamma = (s / (s + t)).sum(axis=0)
    new_m2 = (s * projected / (t + s) ** 2).sum(axis=0)
    new_residual = (projected / (1 + s / t) ** 2).sum(axis=0) + rest
    new_alphas = gamma / (new_m2 + _GUARD)
    new_betas = np.maximum(count - gamma, 1e-12) / (new_residual + _GUARD)
    ratios = np.where(active, t, ratios)
    m2 = np.where(active, new_m2, m2)
    residual = np.where(active, new_residual, residual)
    alphas = np.where(active, new_alphas, alphas)
    betas = np.where(active, new_betas, betas)
    active &= ~(np.abs(alphas / betas - t) / t <= 1e-3)
    if not active.any():
      break
  scores = (
    width / 2 * np.log(alphas)
    + count / 2 * np.log(betas)
    - 0.5 * np.log(alphas + betas * s).sum(axis=0)
    - betas / 2 * residual
    - alphas / 2 * m2
    - count / 2 * np.log(2 * np.pi)
  )
  if exact:
    scores = scores - 0.5 * (width - len(eigenvalues)) * np.log(alphas)
  return scores / count, alphas, betas, ratios, ~active


def _noise_alone(squares, count):
  """What `_jmlr` returns, of features that are all zero."""
  betas = count / (squares + _GUARD)
  scores = count / 2 * (np.log(betas) - 1 - np.log(2 * np.pi))
  ones = np.ones(len(squares))
  return scores / count, ones, betas, 1 / betas, ones > 0


def _icml(features, targets):
  """The first published algorithm, column by column."""
  count, width = features.shape
  gram = features.T @ features
  _check_finite('products of features', gram)
  if not gram.any():
    squares = (targets**2).sum(axis=0)
    scores, alphas, betas, _, converged = _noise_alone(squares, count)
    means = np.zeros((targets.shape[1], width))
    return scores, alphas, betas, means, converged
  eigenvalues, vectors = np.linalg.eigh(gram)
  eigenvalues = np.maximum(eigenvalues, 0.0)
  turned = vectors.T @ (features.T @ targets)
  rows = []
  for column in range(targets.shape[1]):
    y = targets[:, column]
    alpha = beta = 1.0
    ratio, converged = alpha / beta, False
    for _ in range(11):
      gamma = (beta * eigenvalues / (alpha + beta * eigenvalues)).sum()
      mean = vectors @ (beta * turned[:, column] / (alpha + beta * eigenvalues))
      residual = ((y - features @ mean) ** 2).sum()
      m2 = (mean**2).sum()
      alpha = gamma / (m2 + _GUARD)
      beta = max(count - gamma, 1e-12) / (residual + _GUARD)
      new = alpha / beta
      converged = abs(new - ratio) / ratio < 1e-2
      ratio = new
      if converged:
        break
    # The released score keeps the last mean, from one step before alpha and
    # beta, and adds its guards.
    residual, m2 = residual + _GUARD, m2 + _GUARD
    score = (
      width / 2 * np.log(alpha)
      + count / 2 * np.log(beta)
      - 0.5 * np.log(alpha + beta * eigenvalues).sum()
      - beta / 2 * residual
      - alpha / 2 * m2
      - count / 2 * np.log(2 * np.pi)
    )
    rows.append((score / count, alpha, beta, mean, converged))
  scores, alphas, betas, means, converged = zip(*rows)
  return (
    np.array(scores), np.array(alphas), np.array(betas), np.array(means),
    np.array(converged),
  )  # fmt: skip


def _finished(scores, alphas, betas, means, converged):
  _check_finite('scores of columns', scores)
  if not converged.all():
    logging.info(
      'LogME: %d of %d columns had not converged after 11 steps.',
      int((~converged).sum()), len(converged),
    )  # fmt: skip
  return Evidence(float(np.mean(scores)), alphas, betas, means, converged)
