# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixed random samples: of all of a split, however it is sorted.

Every example has a random number, drawn in the order of the split; those with
the smallest are the sample. So a sample is uniform and without replacement,
the same in every process, and a smaller one is part of a larger one.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from mergejax.data import sources

# Documents of a larger file are sampled before they are cut into pieces.
DOCUMENT_BYTES = 1 << 26
_CHUNK = 1024


def numbers(count: int, most: int, seed: int = 0) -> np.ndarray:
  """`<int64>[min(most, count)]` numbers below `count`, ascending.

  Example:
    >>> numbers(10, 3)
    array([1, 2, 3])
  """
  order = np.argsort(np.random.default_rng(seed).random(count), kind='stable')
  return np.sort(order[:most])


def narrowed(
  provider: seqio.Task | seqio.Mixture, split: str, most: int
) -> seqio.Task | seqio.Mixture:
  """A task that reads what a sample needs of a file, where that can be known.

  Of a table, the rows themselves, chosen by number. Of text, documents at
  random up to `DOCUMENT_BYTES`: all of them, unless there are more. Anything
  else is read from end to end.
  """
  source = getattr(provider, 'source', None)
  if not isinstance(source, sources.RowSource):
    return provider
  rows = source.rows(split)
  if source.example_a_row:
    chosen = numbers(len(rows), most)
  else:
    sizes = rows.sizes()
    order = np.random.default_rng(0).permutation(len(rows))
    enough = np.searchsorted(np.cumsum(sizes[order]), DOCUMENT_BYTES) + 1
    chosen = np.sort(order[:enough])
  return provider.replace(source=source.only(split, chosen))


def drawn(
  dataset: tf.data.Dataset, most: int | None
) -> Iterator[dict[str, np.ndarray]]:
  """Reads a dataset once and yields a sample of it, in its own order.

  Args:
    dataset: finite, in a fixed order.
    most: the size of the sample; None takes everything.
  """
  rng = np.random.default_rng(0)
  kept: list[tuple[float, int, Any]] = []
  seen = 0
  for chunk in dataset.batch(_CHUNK).as_numpy_iterator():
    count = len(next(iter(chunk.values())))
    row = lambda i, chunk=chunk: {n: leaf[i] for n, leaf in chunk.items()}
    if most is None:
      yield from map(row, range(count))
      continue
    draws = rng.random(count)
    bound = kept[-1][0] if len(kept) == most else np.inf
    kept += [
      (float(draws[i]), seen + int(i), row(i))
      for i in np.flatnonzero(draws < bound)
    ]
    kept = sorted(kept, key=lambda one: one[:2])[:most]
    seen += count
  for _, _, one in sorted(kept, key=lambda one: one[1]):
    yield one
