# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint does not quite fit a module: what differs, and may."""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np

from mergejax.core import errors
from mergejax.core import typing

_PADDED_TO = 128
_BLOCK = re.compile(r'(.*/mlp/)(wi|wi_0)/kernel')


def check_version(
  wanted: typing.SpecTree, stored: typing.SpecTree, name: str
) -> None:
  """Raises if one is a T5 1.0 and the other a T5 1.1.

  Raises:
    StructureError: names both, and what to set.
  """
  kinds = [_kinds(specs) for specs in (wanted, stored)]
  if not all(kinds) or kinds[0] & kinds[1]:
    return
  versions = {
    'wi': 'T5 1.0 (one `wi`, ReLU)',
    'wi_0': 'T5 1.1 (`wi_0` and `wi_1`, gated GELU)',
  }
  ours, theirs = (versions[min(kind)] for kind in kinds)
  raise errors.StructureError(
    f'The model is a {ours}, but {name} is a {theirs}: weights of one mean '
    "nothing in the other. Configure mlp_activations=('relu',) and "
    "logits_via_embedding=True for 1.0, mlp_activations=('gelu', 'linear') for "
    '1.1, or take the other checkpoint.'
  )


def _kinds(specs):
  matches = (_BLOCK.fullmatch(path) for path in specs)
  return {match[2] for match in matches if match}


def vocabulary_padding(
  wanted: typing.SpecTree, stored: typing.SpecTree
) -> dict[typing.Path, int]:
  """Tables that differ in the padding of their vocabulary alone.

  Args:
    wanted: the module's parameters, with axes.
    stored: the checkpoint's.

  Returns:
    `{path: the axis of the vocabulary}` where two shapes differ in that axis,
    and both sizes are padded to the same multiple of 128.
  """
  found = {}
  for path, spec in wanted.items():
    other = stored.get(path)
    if spec.axes is None or 'vocab' not in spec.axes or other is None:
      continue
    axis = spec.axes.index('vocab')
    if len(other.shape) != len(spec.shape):
      continue
    sizes = other.shape[axis], spec.shape[axis]
    rest = [s[:axis] + s[axis + 1 :] for s in (other.shape, spec.shape)]
    blocks = {-(-size // _PADDED_TO) for size in sizes}
    if sizes[0] != sizes[1] and rest[0] == rest[1] and len(blocks) == 1:
      found[path] = axis
  return found


def check_vocabulary(
  padding: Mapping[typing.Path, int],
  wanted: typing.SpecTree,
  stored: typing.SpecTree,
  name: str,
) -> None:
  """Raises, with both shapes, for tables of another padding.

  Raises:
    StructureError: there is one.
  """
  if padding:
    lines = [
      f'{path} {list(wanted[path].shape)} expected, '
      f'{list(stored[path].shape)} given'
      for path in padding
    ]
    raise errors.StructureError(
      f'{name} has a vocabulary of another size than the model, which may be '
      f'its padding to a multiple of {_PADDED_TO}:\n{errors.listed(lines)}\n'
      'Configure the vocab_size of the checkpoint, or set pad_vocabulary=True: '
      'rows that are added are the mean of those there, rows beyond the smaller '
      'size are left out.'
    )


def padded(leaf: Any, size: int, axis: int) -> np.ndarray:
  """A table with `size` tokens along an axis: cut, or filled with their mean.

  Args:
    leaf: <float>[...].
    size: tokens wanted.
    axis: the axis of the vocabulary.

  Example:
    >>> padded(np.float32([[1, 3], [3, 5]]), 3, 0).tolist()
    [[1.0, 3.0], [3.0, 5.0], [2.0, 4.0]]
  """
  leaf = np.asarray(leaf)
  have = leaf.shape[axis]
  if size <= have:
    return np.take(leaf, np.arange(size), axis)
  mean = leaf.astype(np.float32).mean(axis=axis, keepdims=True)
  more = np.repeat(mean.astype(leaf.dtype), size - have, axis)
  return np.concatenate([leaf, more], axis)
