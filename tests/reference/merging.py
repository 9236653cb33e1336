# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Slow float64 oracles of merge methods, written from the papers."""

import numpy as np
from reference import words


def linear(models, base, weights, *, normalize=True):
  del base
  result = {}
  for path in models[0]:
    total = 0.0
    for model, weight in zip(models, weights):
      total = total + weight * words.wide(model)[path]
    result[path] = total / sum(weights) if normalize else total
  return result


def task_arithmetic(models, base, weights, *, scale=1.0, normalize=False):
  result = {}
  for path, origin in words.wide(base).items():
    total = np.zeros_like(origin)
    for model, weight in zip(models, weights):
      total += weight * (words.wide(model)[path] - origin)
    if normalize:
      total /= sum(weights)
    result[path] = origin + scale * total
  return result


def interpolate(models, base, weights, *, alpha):
  mean = linear(models, base, weights)
  return {
    path: (1 - alpha) * origin + alpha * mean[path]
    for path, origin in words.wide(base).items()
  }


def negate(models, base, weights, *, scale=1.0):
  del weights
  return {
    path: origin - scale * (words.wide(models[0])[path] - origin)
    for path, origin in words.wide(base).items()
  }


def analogy(models, base, weights, *, scale=1.0):
  del weights
  a, b, c = map(words.wide, models)
  return {
    path: origin + scale * (c[path] + b[path] - a[path] - origin)
    for path, origin in words.wide(base).items()
  }


def passthrough(models, base, weights, *, scale=1.0):
  del base, weights
  return {path: scale * leaf for path, leaf in words.wide(models[0]).items()}


def ties(
  models,
  base,
  weights,
  *,
  density=0.2,
  scale=1.0,
  normalize=True,
  trim_scope='global',
  consensus='sum',
  aggregate='sum',
):
  names = list(base)
  deltas = [
    {p: words.wide(model)[p] - words.wide(base)[p] for p in names}
    for model in models
  ]
  trimmed = []
  for delta, share in zip(deltas, words.each(density, len(models))):
    if trim_scope == 'global':
      flat = np.concatenate([np.abs(delta[p]).ravel() for p in names])
      mask = words.top(flat, int(share * flat.size))
      ends = np.cumsum([delta[p].size for p in names])[:-1]
      parts = dict(zip(names, np.split(mask, ends)))
      masks = {p: parts[p].reshape(delta[p].shape) for p in names}
    else:
      masks = {
        p: words.top(np.abs(delta[p]), max(1, int(share * delta[p].size)))
        for p in names
      }
    trimmed.append({p: np.where(masks[p], delta[p], 0) for p in names})
  result = {}
  for p in names:
    parts = [t[p] for t in trimmed]
    if aggregate == 'max':
      values = [w * d for w, d in zip(weights, parts)]
      up = sum(values) >= 0
      merged = np.where(
        up,
        np.max([np.maximum(v, 0) for v in values], axis=0),
        np.min([np.minimum(v, 0) for v in values], axis=0),
      )
    else:
      merged = words.combine(parts, weights, normalize, consensus)
    result[p] = words.wide(base)[p] + scale * merged
  return result


def breadcrumbs(
  models,
  base,
  weights,
  *,
  density=1.0,
  gamma=0.01,
  scale=1.0,
  normalize=False,
  election=None,
):
  def one(leaves, origin, weights):
    deltas = [
      words.crumbs(leaf - origin, share, outliers)
      for leaf, share, outliers in zip(
        leaves, words.each(density, len(leaves)), words.each(gamma, len(leaves))
      )
    ]
    return origin + scale * words.combine(deltas, weights, normalize, election)

  return words.leafwise(one)(models, base, weights)


def breadcrumbs_ties(*args, **options):
  return breadcrumbs(*args, **options, election='sum')


def dare_linear(
  models,
  base,
  weights,
  *,
  density,
  scale=1.0,
  normalize=False,
  rescale='paper',
  election=None,
):
  result = {}
  for path, origin in words.wide(base).items():
    deltas = []
    for k, model in enumerate(models):
      delta = words.wide(model)[path] - origin
      share = np.full(delta.shape, words.each(density, len(models))[k])
      drawn = words.uniform(0, path, k, delta.size)
      deltas.append(words.dropped(delta, share, drawn, rescale))
    result[path] = origin + scale * words.combine(
      deltas, weights, normalize, election
    )
  return result


def dare_ties(*args, **options):
  return dare_linear(*args, **options, election='sum')


def della_linear(
  models,
  base,
  weights,
  *,
  density,
  epsilon=0.15,
  scale=1.0,
  normalize=False,
  rescale='paper',
  election=None,
):
  result = {}
  for path, origin in words.wide(base).items():
    deltas = []
    for k, model in enumerate(models):
      rows, back = words.units(path, words.wide(model)[path] - origin)
      share = words.each(density, len(models))[k]
      chance = np.zeros_like(rows)
      for unit, row in enumerate(rows):
        size = np.abs(row).astype(np.float32)
        order = sorted(range(row.size), key=lambda i: (size[i], i))
        for rank, i in enumerate(order):
          chance[unit, i] = (
            share
            if row.size == 1
            else share - epsilon + 2 * epsilon * rank / (row.size - 1)
          )
      if share >= 1:
        chance[:] = 1
      drawn = words.uniform(0, path, k, rows.size)
      deltas.append(back(words.dropped(rows, chance, drawn, rescale)))
    result[path] = origin + scale * words.combine(
      deltas, weights, normalize, election
    )
  return result


def della(models, base, weights, *, normalize=True, **options):
  return della_linear(
    models, base, weights, normalize=normalize, election='sum', **options
  )


@words.leafwise
def sce(leaves, base, weights, *, select_topk=1.0):
  del weights
  deltas = [leaf - base for leaf in leaves]
  if select_topk < 1:
    spread = np.var(np.stack(deltas).astype(np.float32), axis=0)
    mask = words.top(spread, int(select_topk * np.count_nonzero(spread)))
    deltas = [np.where(mask, d, 0) for d in deltas]
  energy = np.array([np.sum(d**2) for d in deltas])
  share = (
    energy / energy.sum()
    if energy.sum() >= 1e-6
    else np.full(len(deltas), 1 / len(deltas))
  )
  sign = np.where(sum(deltas) >= 0, 1, -1)
  agree = [np.sign(d) == sign for d in deltas]
  bottom = sum(c * m for c, m in zip(share, agree))
  total = sum(c * m * d for c, m, d in zip(share, agree, deltas))
  return base + total / np.maximum(bottom, 1e-6)


@words.leafwise
def nearswap(leaves, base, weights, *, t):
  del weights
  share = np.clip(t / np.maximum(np.abs(base - leaves[0]), 1e-6), 0, 1)
  return share * leaves[0] + (1 - share) * base


def arcee_fusion(models, base, weights):
  del weights
  result = {}
  for path, origin in words.wide(base).items():
    rows_a, back = words.units(path, origin)
    rows_b, _ = words.units(path, words.wide(models[0])[path])
    softmax = lambda r: np.exp(r) / np.exp(r).sum(axis=1, keepdims=True)
    p, q = softmax(rows_b) + 1e-8, softmax(rows_a) + 1e-8
    kl = np.sum(p * np.log(p / q), axis=1, keepdims=True)
    importance = np.abs(rows_b - rows_a) * kl
    ordered = np.sort(importance.ravel())
    low, middle, high = (
      ordered[int(np.floor(f * (ordered.size - 1)))] for f in (0.25, 0.5, 0.75)
    )
    threshold = middle + 1.5 * (high - low)
    result[path] = back(np.where(importance >= threshold, rows_b, rows_a))
  return result


@words.leafwise
def ram(leaves, base, weights, *, epsilon=1e-5, factors=None):
  del weights
  deltas = [leaf - base for leaf in leaves]
  active = np.stack([np.abs(d) > epsilon for d in deltas])
  merged = np.zeros_like(base)
  for at in np.ndindex(merged.shape):
    own = [k for k in range(len(deltas)) if active[(k, *at)]]
    if len(own) == 1:
      factor = 1 if factors is None else factors(active)[own[0]]
      merged[at] = factor * deltas[own[0]][at]
    elif own:
      merged[at] = np.mean([deltas[k][at] for k in own])
  return base + merged


def ram_plus(models, base, weights, *, r=0.1, alpha=0.2, epsilon=1e-5):
  def factors(active):
    count = active.sum(axis=0)
    shared = [np.sum(a & (count > 1)) for a in active]
    unique = [np.sum(a & (count == 1)) for a in active]
    return [
      1 + r * np.clip(s / max(u, 1), 0, alpha) for s, u in zip(shared, unique)
    ]

  return ram(models, base, weights, epsilon=epsilon, factors=factors)


def fisher(
  models,
  base,
  weights,
  *,
  stats,
  normalize_fishers='model',
  floor=1e-6,
  favor_first=True,
):
  del base
  information = [
    {p: np.asarray(one[p]['fisher'], np.float64) for p in models[0]}
    for one in stats
  ]
  result = {}
  for path in models[0]:
    top_sum, bottom = 0.0, 0.0
    for k, (model, weight) in enumerate(zip(models, weights)):
      if normalize_fishers == 'model':
        norm = np.sqrt(sum(np.sum(f**2) for f in information[k].values()))
      elif normalize_fishers == 'leaf':
        norm = np.sqrt(np.sum(information[k][path] ** 2))
      else:
        norm = 1.0
      f = information[k][path]
      if k == 0 or not favor_first:
        f = np.maximum(f, floor)
      top_sum = top_sum + weight / norm * f * words.wide(model)[path]
      bottom = bottom + weight / norm * f
    plain = (
      words.wide(models[0])[path]
      if favor_first
      else linear(models, None, weights)[path]
    )
    safe = np.where(bottom > 0, bottom, 1)
    result[path] = np.where(bottom > 0, top_sum / safe, plain)
  return result


def regmean(models, base, weights, *, stats, alpha=0.9, ridge=0.0):
  result = linear(models, base, weights)
  for path in stats[0]:
    shape = models[0][path].shape
    left, right = 0.0, 0.0
    for model, weight, one in zip(models, weights, stats):
      gram = np.asarray(one[path]['gram'], np.float64)
      diagonal = np.diag(np.diag(gram))
      gram = alpha * gram + (1 - alpha) * diagonal
      gram = gram + ridge * np.mean(np.diag(gram)) * np.eye(len(gram))
      kernel = words.wide(model)[path].reshape(len(gram), -1)
      left = left + weight * gram
      right = right + weight * gram @ kernel
    solved = np.linalg.pinv(left) @ right
    dead = np.diag(left) == 0
    solved[dead] = result[path].reshape(solved.shape)[dead]
    result[path] = solved.reshape(shape)
  return result
