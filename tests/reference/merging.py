# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Slow float64 oracles of merge methods, written from the papers."""

import numpy as np


def _wide(tree):
  return {
    path: np.asarray(leaf).astype(np.float64) for path, leaf in tree.items()
  }


def linear(models, base, weights, *, normalize=True):
  del base
  result = {}
  for path in models[0]:
    total = 0.0
    for model, weight in zip(models, weights):
      total = total + weight * _wide(model)[path]
    result[path] = total / sum(weights) if normalize else total
  return result


def task_arithmetic(models, base, weights, *, scale=1.0, normalize=False):
  result = {}
  for path, origin in _wide(base).items():
    total = np.zeros_like(origin)
    for model, weight in zip(models, weights):
      total += weight * (_wide(model)[path] - origin)
    if normalize:
      total /= sum(weights)
    result[path] = origin + scale * total
  return result


def interpolate(models, base, weights, *, alpha):
  mean = linear(models, base, weights)
  return {
    path: (1 - alpha) * origin + alpha * mean[path]
    for path, origin in _wide(base).items()
  }


def negate(models, base, weights, *, scale=1.0):
  del weights
  return {
    path: origin - scale * (_wide(models[0])[path] - origin)
    for path, origin in _wide(base).items()
  }


def analogy(models, base, weights, *, scale=1.0):
  del weights
  a, b, c = map(_wide, models)
  return {
    path: origin + scale * (c[path] + b[path] - a[path] - origin)
    for path, origin in _wide(base).items()
  }
