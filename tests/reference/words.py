# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the oracles of several methods share: masks, elections, draws, units."""

import hashlib

import numpy as np


def wide(tree):
  return {
    path: np.asarray(leaf).astype(np.float64) for path, leaf in tree.items()
  }


def leafwise(function):
  """An oracle of trees from one of leaves: `(leaves, base, weights)`."""

  def run(models, base, weights, **options):
    return {
      path: function(
        [wide(model)[path] for model in models],
        None if base is None else wide(base)[path],
        weights,
        **options,
      )
      for path in models[0]
    }

  return run


def top(scores, kept):
  """Mask of the `kept` largest, equal ones by lowest flat index."""
  flat = np.asarray(scores, np.float32).ravel()
  order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
  mask = np.zeros(flat.size, bool)
  mask[order[:kept]] = True
  return mask.reshape(np.shape(scores))


def each(option, models):
  return option if isinstance(option, list) else [option] * models


def elect(values, weights, normalize, count):
  total = np.zeros_like(values[0])
  for at in np.ndindex(total.shape):
    entries = [value[at] for value in values]
    votes = sum(np.sign(entries)) if count else sum(entries)
    sign = 1 if votes >= 0 else -1
    agreeing = [k for k, e in enumerate(entries) if np.sign(e) == sign]
    total[at] = sum(entries[k] for k in agreeing)
    weight = sum(weights[k] for k in agreeing)
    if normalize and weight != 0:
      total[at] /= weight
  return total


def combine(deltas, weights, normalize, election):
  values = [w * d for w, d in zip(weights, deltas)]
  if election:
    return elect(values, weights, normalize, election == 'count')
  return sum(values) / (sum(weights) if normalize else 1)


def crumbs(delta, density, gamma):
  size = delta.size
  kept = int(density * size)
  largest = int(gamma * size)
  smallest = max(0, size - kept - largest)
  ascending = np.zeros(size, int)
  flat = np.abs(delta).ravel().astype(np.float32)
  for rank, i in enumerate(sorted(range(size), key=lambda i: (flat[i], -i))):
    ascending[i] = rank
  keep = (ascending >= smallest) & (ascending < smallest + kept)
  return np.where(keep.reshape(delta.shape), delta, 0)


def uniform(seed, path, model, count):
  """The documented counter hash, in Python integers."""
  digest = hashlib.blake2b(f'{seed}\0{model}\0{path}'.encode(), digest_size=8)
  key = [int.from_bytes(digest.digest()[i : i + 4], 'little') for i in (0, 4)]

  def scramble(x):
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)

  words = [
    scramble(scramble((i * 0x9E3779B9 + key[0]) % 2**32) ^ key[1])
    for i in range(count)
  ]
  return np.array([(word >> 8) / 2**24 for word in words])


def dropped(delta, chance, drawn, rescale):
  kept = drawn.reshape(delta.shape) < chance
  if rescale == 'paper':
    return np.where(kept, delta / np.where(chance > 0, chance, 1), 0)
  sparse = np.where(kept, delta, 0)
  if rescale == 'none':
    return sparse
  order = {'l1': 1, 'l2': 2, 'linf': np.inf}[rescale]
  norms = [np.linalg.norm(x.ravel(), order) for x in (delta, sparse)]
  return sparse * (norms[0] / norms[1] if min(norms) > 1e-7 else 1)


def units(path, leaf):
  """Rows of output units, and how to go back; Flax layout by hand."""
  if leaf.ndim <= 1:
    return leaf.reshape(1, -1), lambda rows: rows.reshape(leaf.shape)
  rows = leaf.reshape(-1, leaf.shape[-1]).T
  return rows, lambda rows: rows.T.reshape(leaf.shape)
