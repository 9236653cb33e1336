# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How a model answers token by token, as its family says it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from mergejax.core import errors
from mergejax.core import typing


class Decoding:
  """The part of a `ModelFamily` that decodes; by default it does not.

  Attributes:
    model_type: of the family.
    decodes: whether `init_cache` and `decode_step` are there.
    answers: whether the targets are an answer to inputs apart from them, to be
      drawn token by token, as in encoder-decoders.
  """

  model_type: ClassVar[str] = ''
  decodes: ClassVar[bool] = False
  answers: ClassVar[bool] = False

  def init_cache(
    self, params: typing.Tree, batch: Mapping[str, Any], length: int
  ) -> typing.Tree:
    """What decoding keeps: the inputs read, and room for `length` tokens."""
    raise errors.ConfigError(f'{self.model_type} models do not decode.')

  def decode_step(
    self, params: typing.Tree, cache: typing.Tree, tokens: jax.Array
  ) -> tuple[jax.Array, typing.Tree]:
    """One position further.

    Args:
      params: of the model.
      cache: from `init_cache` or the step before.
      tokens: `<int32>[batch]`, the last ones; 0 begins.

    Returns:
      `(<float32>[batch, vocab] logits of the next token, cache)`.
    """
    raise errors.ConfigError(f'{self.model_type} models do not decode.')

  def cache_rows(self, path: typing.Path, leaf: jax.Array) -> int | None:
    """The axis along which a leaf of the cache has the rows of the batch.

    Several answers to a row (beams, samples) have a row of their own in what is
    told here, side by side, and beams are moved along it. What all answers to a
    row share is kept once: `decode_step` gets more tokens than it has rows.

    Args:
      path: of the leaf in the cache.
      leaf: of the cache.

    Returns:
      The axis, or None: nothing to repeat. By default 0, of all arrays that
      have axes.
    """
    del path
    return 0 if leaf.ndim else None
