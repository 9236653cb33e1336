# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which adapter of a library a text needs, by how near it is to their texts.

    found = clusters.of_groups({'cola': [...], 'rte': [...]})
    router = AdapterRouter(library, Router(found), ['cola', 'rte'])
    family, params = library.bank(module, base)
    batch['expert_ids'] = router.ids(texts)      # one program for all adapters
    logits = family.apply(family.variables(params), batch).logits

Source: Gururangan et al., c-BTM (2023), https://arxiv.org/abs/2303.14177, of
whole models.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from mergejax import adapters
from mergejax.core import errors
from mergejax.experts import route


@dataclasses.dataclass(frozen=True)
class AdapterRouter:
  """Weights of the adapters of a library after some contexts.

  Attributes:
    library: of adapters of one base.
    router: weights of clusters.
    names: of the adapter that each cluster has, in the clusters' order.

  Raises:
    ConfigError: a cluster without an adapter, an adapter without a cluster, or
      with two.
  """

  library: adapters.Library
  router: route.Router
  names: Sequence[str]

  def __post_init__(self):
    known = list(self.library.cards)
    for name in self.names:
      if name not in known:
        raise errors.ConfigError(errors.near(name, known, 'adapter'))
    count = self.router.clusters.count
    if len(self.names) != count or {*self.names} != {*known}:
      raise errors.ConfigError(
        f'{count} clusters need one adapter each, of the {len(known)} in '
        f'{self.library.path} ({errors.some(known)}), but names are '
        f'{errors.some(list(self.names)) or "none"}.'
      )

  def weights(self, contexts: Sequence[str]) -> np.ndarray:
    """`<float64>[contexts, adapters]`, in the library's order; rows sum to 1.

    They mix the adapters' likelihoods, see `Router.weights`, or weigh a merge
    of them.
    """
    order = [list(self.names).index(name) for name in self.library.cards]
    return self.router.weights(contexts)[:, order]

  def ids(self, contexts: Sequence[str]) -> np.ndarray:
    """`<int32>[contexts]`: the likeliest adapter of each, for a `bank`."""
    return np.argmax(self.weights(contexts), axis=1).astype(np.int32)
