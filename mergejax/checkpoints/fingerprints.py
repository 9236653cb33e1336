# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A short name for the numbers of a model, to tie to it what was made of it."""

import hashlib

import numpy as np

from mergejax.checkpoints import base as store_base
from mergejax.core import numerics
from mergejax.core import typing

# A fingerprint looks at this many numbers at each of so many places of a leaf.
_SAMPLE, _PLACES = 64, 4


def fingerprint(model: typing.Tree | store_base.ParamStore) -> str:
  """A short name for a model's numbers: other weights, another fingerprint.

  SHA-256 over path, shape and some numbers (as float32, spread over each leaf)
  of all floating leaves; the format of the file and the order of the leaves do
  not matter, the dtype does as far as it changes the numbers.

  Args:
    model: parameters, or a store; of files that lie flat little is read.

  Returns:
    32 hexadecimal digits.

  Example:
    >>> fingerprint({'w': np.zeros(3)})
    '4de625968900d2aca493d874f50d8582'
  """
  store = model
  if not isinstance(model, store_base.ParamStore):
    store = store_base.MemoryStore(model)
  specs = store.specs()
  digest = hashlib.sha256()
  for path in sorted(specs):
    spec = specs[path]
    if not numerics.is_averaged(spec.dtype):
      continue
    digest.update(f'{path}{list(spec.shape)}'.encode())
    take = min(_SAMPLE, spec.size)
    starts = {(spec.size - take) * i // (_PLACES - 1) for i in range(_PLACES)}
    for start in sorted(starts):
      numbers = np.empty(take, spec.dtype)
      store.read_into(path, start, numbers)
      digest.update(numbers.astype(np.float32).tobytes())
  return digest.hexdigest()[:32]
