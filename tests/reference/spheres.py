# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Slow float64 oracles of the methods that look at angles between models."""

import numpy as np
from reference import words


def _angle(a, b):
  norms = [np.linalg.norm(x) for x in (a, b)]
  norms = [1.0 if n <= 1e-8 else n for n in norms]
  return np.clip(np.vdot(a, b) / (norms[0] * norms[1]), -1, 1)


@words.leafwise
def slerp(leaves, base, weights, *, t):
  del weights
  cosine = _angle(base, leaves[0])
  if abs(cosine) > 0.9995:
    return (1 - t) * base + t * leaves[0]
  angle = np.arccos(cosine)
  return (
    np.sin((1 - t) * angle) * base + np.sin(t * angle) * leaves[0]
  ) / np.sin(angle)


def _nuslerp(a, b, weights):
  t = weights[1] / sum(weights)
  angle = np.arccos(_angle(a, b))
  if np.sin(angle) < 1e-8:
    return (1 - t) * a + t * b
  return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(models, base, weights, *, flatten=True, axis='output_unit'):
  result = {}
  for path in models[0]:
    a, b = (words.wide(m)[path] for m in models)
    origin = 0 if base is None else words.wide(base)[path]
    a, b = a - origin, b - origin
    if flatten:
      result[path] = origin + _nuslerp(a, b, weights)
      continue
    (rows_a, back), (rows_b, _) = words.units(path, a), words.units(path, b)
    if axis == 'input_feature' and a.ndim > 1:
      rows_a, rows_b = rows_a.T, rows_b.T
    merged = np.stack([_nuslerp(x, y, weights) for x, y in zip(rows_a, rows_b)])
    if axis == 'input_feature' and a.ndim > 1:
      merged = merged.T
    result[path] = origin + back(merged)
  return result


@words.leafwise
def multislerp(leaves, base, weights, *, normalize_weights=True, eps=1e-8):
  if base is not None:
    leaves = [leaf - base for leaf in leaves]
  weights = np.array(weights, float)
  if normalize_weights:
    weights /= weights.sum()
  units = [x / (np.linalg.norm(x) + eps) for x in leaves]
  middle = sum(w * u for w, u in zip(weights, units))
  length = np.linalg.norm(middle)
  if length < eps:
    merged = sum(w * x for w, x in zip(weights, leaves))
  else:
    size = sum(w * np.linalg.norm(x) for w, x in zip(weights, leaves))
    merged = size * middle / length
  return merged if base is None else base + merged


@words.leafwise
def karcher(leaves, base, weights, *, max_iter=10, tol=1e-5):
  del base, weights
  norms = [np.linalg.norm(x) for x in leaves]
  units = [x / n for x, n in zip(leaves, norms) if n > tol]
  if not units:
    return np.zeros_like(leaves[0])
  u = sum(units) / len(units)
  u = units[0] if np.linalg.norm(u) < tol else u / np.linalg.norm(u)
  for _ in range(max_iter):
    step = np.zeros_like(u)
    for one in units:
      cosine = np.vdot(u, one)
      rest = one - cosine * u
      angle = np.arctan2(np.linalg.norm(rest), cosine)
      if angle > tol and np.sin(angle) > 1e-6:
        step = step + angle / np.sin(angle) * rest / len(units)
    size = np.linalg.norm(step)
    if size < tol:
      break
    u = np.cos(size) * u + np.sin(size) * step / size
    u = u / np.linalg.norm(u)
  return u * np.mean(norms)


def _stock(leaves, base, clamp_t):
  deltas = [leaf - base for leaf in leaves]
  n = len(deltas)
  cosines = [
    np.clip(
      np.vdot(deltas[i], deltas[j])
      / max(np.linalg.norm(deltas[i]) * np.linalg.norm(deltas[j]), 1e-6),
      -1,
      1,
    )
    for i in range(n)
    for j in range(i)
  ]
  c = np.mean(cosines)
  bottom = 1 + (n - 1) * c
  t = 0 if abs(bottom) < 1e-6 else n * c / bottom
  t = np.clip(t, 0, 1) if clamp_t else t
  return t * sum(leaves) / n + (1 - t) * base


def model_stock(models, base, weights, *, filter_wise=False, clamp_t=False):
  del weights
  result = {}
  for path, origin in words.wide(base).items():
    leaves = [words.wide(m)[path] for m in models]
    if not filter_wise:
      result[path] = _stock(leaves, origin, clamp_t)
      continue
    rows, back = words.units(path, origin)
    of_models = [words.units(path, leaf)[0] for leaf in leaves]
    result[path] = back(
      np.stack(
        [
          _stock([m[i] for m in of_models], rows[i], clamp_t)
          for i in range(len(rows))
        ]
      )
    )
  return result
