# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which experts a context needs, by how near it is to their clusters.

    weights = Router(clusters, top_k=2).weights(['The court held that', ...])
    mixture = Mixture(family, experts=K, posterior=Posterior('fixed'))
    params = mixture.join(experts, weights.T)

Source: Gururangan et al., c-BTM (2023), https://arxiv.org/abs/2303.14177.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from mergejax.core import errors
from mergejax.experts import clusters as clusters_lib
from mergejax.experts import ensemble


@dataclasses.dataclass(frozen=True)
class Router:
  """Weights of experts that were trained on clusters.

  `w_j ~ exp(-||h - c_j||^2 / T)`, of which the k largest are kept and
  renormalised. With one cluster it is one model.

  Attributes:
    clusters: their centres, one an expert, in the order of the experts.
    temperature: T; 0.1 in the paper. Large ones mix all experts alike.
    top_k: experts that answer; None: all. A few are nearly as good as all.

  Raises:
    ConfigError: a number out of its range.
  """

  clusters: clusters_lib.Clusters
  temperature: float = 0.1
  top_k: int | None = None

  def __post_init__(self):
    errors.check_number('temperature', self.temperature, 0, open_below=True)
    if self.top_k is not None:
      errors.check_whole('top-k', self.top_k)

  def weights(self, contexts: Sequence[str]) -> np.ndarray:
    """The weights of the experts after some contexts.

    Args:
      contexts: what stands before the tokens that are to come.

    Returns:
      `<float64>[contexts, K]`, rows sum to 1; uniform for a context without a
      word that any cluster knows. Its transpose is a prior for
      `ensemble.log_posterior` and `Mixture`, with the posterior 'fixed'.
    """
    points = self.clusters.embed(contexts)
    distance = clusters_lib.distances(points, self.clusters.centres)
    logits = -np.asarray(distance, np.float64) / self.temperature
    logits[~points.any(axis=1)] = 0
    near = np.exp(logits - logits.max(axis=1, keepdims=True))
    near /= near.sum(axis=1, keepdims=True)
    if self.top_k is None:
      return near
    return np.stack([ensemble.keep_top(row, self.top_k) for row in near])
