# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Domains without labels: documents in clusters of equal size.

    clusters = clusters.fit(texts, 8)
    clusters.assignment            # <int32>[documents], equally many of each
    clusters.save('clusters')
    router = route.Router(clusters.load('clusters'), top_k=2)

A document is its words by TF-IDF, cut to a few directions by a truncated SVD,
of length 1. k-means whose clusters must have equal size gives every expert as
much text; a new text goes to the nearest centre.

Source: Gururangan et al., "Scaling Expert Language Models with Unsupervised
Domain Discovery" (c-BTM, 2023), https://arxiv.org/abs/2303.14177.
It solves the balanced assignment by an auction; here it is greedy, those first
that would lose most. Vectors of length 1 are ours too: documents differ in
length, and their contexts are short.
"""

from collections.abc import Mapping, Sequence
import functools
import importlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files

_ABOUT, _ARRAYS = 'clusters.json', 'clusters.npz'
# The most iterations of k-means; it is over when no document moves.
_MOST = 50


class Clusters:
  """Centres of clusters, and how a text becomes a point among them.

  Attributes:
    centres: `<float32>[K, directions]`.
    assignment: `<int32>[documents]` of those it was fitted to; None if it was
      loaded.
  """

  def __init__(
    self,
    terms: Sequence[str],
    idf: np.ndarray,
    directions: np.ndarray,
    centres: np.ndarray,
    assignment: np.ndarray | None = None,
  ):
    """Puts together what `fit` found or `load` read.

    Args:
      terms: words, in the order of `idf`.
      idf: `<float>[words]` their inverse document frequencies.
      directions: `<float>[directions, words]` of the SVD.
      centres: see above.
      assignment: likewise.
    """
    self.centres = np.asarray(centres, np.float32)
    self.assignment = assignment
    self._terms = list(terms)
    self._idf = np.asarray(idf, np.float64)
    self._directions = np.asarray(directions, np.float32)
    self._vectorizer = _words(vocabulary=self._terms)
    self._vectorizer.idf_ = self._idf

  @property
  def count(self) -> int:
    """K."""
    return len(self.centres)

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """`<float32>[texts, directions]`, of length 1; 0 without a known word."""
    found = self._vectorizer.transform(texts) @ self._directions.T
    return _unit(np.asarray(found, np.float32))

  def nearest(self, texts: Sequence[str]) -> np.ndarray:
    """`<int32>[texts]`: the cluster of each, by the nearest centre."""
    return np.argmin(distances(self.embed(texts), self.centres), axis=1)

  def save(self, path: os.PathLike | str) -> None:
    """Writes a folder of JSON and NumPy arrays.

    Raises:
      UserError: it exists, or the disk is full.
    """
    with files.atomic_path(path) as folder:
      folder.mkdir()
      about = {'terms': self._terms}
      (folder / _ABOUT).write_text(json.dumps(about, ensure_ascii=False))
      np.savez(
        folder / _ARRAYS, idf=self._idf, directions=self._directions,
        centres=self.centres,
      )  # fmt: skip


def load(path: os.PathLike | str) -> Clusters:
  """Reads what `Clusters.save` wrote.

  Raises:
    UserError: there are no clusters.
  """
  folder = pathlib.Path(path).expanduser()
  if not (folder / _ARRAYS).is_file():
    raise errors.CheckpointError(
      f'{folder} holds no clusters: it has no {_ARRAYS}. `mergejax forest '
      'cluster` makes them.'
    )
  terms = checkpoint.read_json(folder / _ABOUT)['terms']
  with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
    return Clusters(terms, **dict(arrays))


def fit(
  texts: Sequence[str],
  count: int,
  *,
  directions: int = 100,
  min_documents: int = 2,
  seed: int = 0,
) -> Clusters:
  """Clusters documents into equally many each.

  Args:
    texts: documents.
    count: K.
    directions: of the truncated SVD; 100 as in the paper.
    min_documents: words in fewer documents do not count.
    seed: of the SVD and of the first centres.

  Returns:
    The clusters; their sizes differ by one at most.

  Raises:
    ConfigError: fewer documents than clusters, or scikit-learn is missing.
    DataError: the documents have no word in common.
  """
  errors.check_whole('clusters', count)
  errors.check_whole('seed', seed, least=0)
  if len(texts) < count:
    raise errors.ConfigError(
      f'{len(texts)} documents do not make {count} clusters.'
    )
  make, points = _space(texts, directions, min_documents, seed)
  centres, assignment = balanced_k_means(points, count, seed=seed)
  return make(centres, assignment)


def of_groups(
  groups: Mapping[str, Sequence[str]],
  *,
  directions: int = 100,
  min_documents: int = 2,
  seed: int = 0,
) -> Clusters:
  """Clusters of texts whose domains are known: tasks with adapters, say.

  A centre is the mean of the points of a group. Groups may differ in size.

  Args:
    groups: `{name: texts}`; clusters are in the order of the names given.
    directions: see `fit`.
    min_documents: likewise.
    seed: of the SVD.

  Raises:
    ConfigError: a group without a text, or scikit-learn is missing.
    DataError: the texts have no word in common.
  """
  empty = [name for name, texts in groups.items() if not texts]
  if empty or not groups:
    raise errors.ConfigError(
      f'A group without a text has no centre: {errors.some(empty) or "no group"}.'
    )
  texts = [text for each in groups.values() for text in each]
  sizes = [len(each) for each in groups.values()]
  assignment = np.repeat(np.arange(len(groups), dtype=np.int32), sizes)
  make, points = _space(texts, directions, min_documents, seed)
  centres = np.stack([
    points[assignment == i].mean(axis=0) for i in range(len(groups))
  ])  # fmt: skip
  return make(centres, assignment)


def _space(texts, directions, min_documents, seed):
  """`(what makes clusters of centres, points of texts)`."""
  vectorizer = _words(min_df=min(min_documents, len(texts)))
  try:
    weights = vectorizer.fit_transform(texts)
  except ValueError as error:  # no word is left
    raise errors.DataError(
      f'No word stands in {min_documents} of the {len(texts)} documents, so '
      'that nothing tells them apart by topic.'
    ) from error
  most = min(directions, min(weights.shape) - 1)
  svd = _sklearn('decomposition').TruncatedSVD(max(most, 1), random_state=seed)
  points = _unit(np.asarray(svd.fit_transform(weights), np.float32))
  terms = vectorizer.get_feature_names_out().tolist()
  make = functools.partial(Clusters, terms, vectorizer.idf_, svd.components_)
  return make, points


def balanced_k_means(
  points: np.ndarray, count: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """k-means in which every cluster has equally many points.

  Args:
    points: `<float32>[points, directions]`.
    count: K.
    seed: of the first centres, by k-means++.

  Returns:
    `(centres <float32>[K, directions], <int32>[points])`.
  """
  first, _ = _sklearn('cluster').kmeans_plusplus(
    points, count, random_state=seed
  )
  centres = np.asarray(first, np.float32)
  before = np.full(len(points), -1, np.int32)
  for _ in range(_MOST):
    assignment = balanced_assignment(distances(points, centres))
    if np.array_equal(assignment, before):
      break
    before = assignment
    centres = np.stack(
      [points[assignment == k].mean(axis=0) for k in range(count)]
    )
  return centres, before


def balanced_assignment(costs: np.ndarray) -> np.ndarray:
  """Gives every point a cluster so that clusters have equal size.

  Greedy: of the points left, those go first that would lose most with their
  second choice among the clusters with room; whenever a cluster is full, the
  choices are made anew.

  Args:
    costs: `<float>[points, K]`.

  Returns:
    `<int32>[points]`; the sizes of clusters differ by one at most.

  Example:
    >>> balanced_assignment(np.array([[0., 1.], [0., 5.], [0., 2.], [3., 4.]]))
    array([1, 0, 0, 1], dtype=int32)
  """
  points, count = costs.shape
  room = np.full(count, points // count)
  larger = points % count  # so many clusters may have one more
  found = np.full(points, -1, np.int32)
  left = np.arange(points)
  while len(left):
    open_ = np.flatnonzero(room + (1 if larger else 0) > 0)
    near = costs[np.ix_(left, open_)]
    order = np.argsort(near, axis=1, kind='stable')
    best = open_[order[:, 0]]
    if len(open_) > 1:
      two = np.take_along_axis(near, order[:, :2], axis=1)
      turn = np.argsort(two[:, 0] - two[:, 1], kind='stable')
    else:
      turn = np.arange(len(left))
    for i in turn:
      k = best[i]
      if room[k] <= 0:
        if not larger or room[k] < 0:
          break  # full: the others choose anew
        larger -= 1
      room[k] -= 1
      found[left[i]] = k
    left = left[found[left] < 0]
  return found


def distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """`<float32>[points, K]`: squared Euclidean distances."""
  square = lambda x: np.sum(np.square(x), axis=1)
  found = square(points)[:, None] - 2 * points @ centres.T + square(centres)
  return np.maximum(found, 0)


def _unit(points):
  """Rows of length 1; rows of 0 stay."""
  length = np.linalg.norm(points, axis=1, keepdims=True)
  return points / np.where(length > 1e-12, length, 1)


def _words(**options: Any) -> Any:
  """TF-IDF over words; many documents of the same word count logarithmically."""
  text = _sklearn('feature_extraction.text')
  return text.TfidfVectorizer(
    sublinear_tf=True, stop_words='english', max_features=100_000, **options
  )


def _sklearn(module: str) -> Any:
  try:
    return importlib.import_module(f'sklearn.{module}')
  except ImportError as error:
    raise errors.ConfigError(
      "Clusters need scikit-learn: pip install 'mergejax[clusters]'."
    ) from error
