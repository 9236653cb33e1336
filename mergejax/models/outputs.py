# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model makes of a batch, and how other libraries store it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax.core import typing


class Outputs(NamedTuple):
  """What a model makes of a batch.

  Attributes:
    logits: `<float>[batch, length, vocab]`, or `[batch, classes]`.
    targets: `<int32>[batch, length]`, or `[batch]`: what should be said.
    weights: `<float32>` of the shape of `targets`; 0 does not count.
    losses: further losses by name, `<float32>[]` each, already scaled: a
      router's load balance. The objective adds them to its own.
    metrics: numbers by name for people to watch, `<float32>[]` each.
    mutable: new values of the flax collections that changed.
    segments: `<int32>[batch, length]` which example of a packed row a target
      belongs to, or None.
  """

  logits: jax.Array
  targets: jax.Array
  weights: jax.Array
  losses: Mapping[str, jax.Array] = {}
  metrics: Mapping[str, jax.Array] = {}
  mutable: Mapping[str, typing.Tree] = {}
  segments: jax.Array | None = None


class Conversion(NamedTuple):
  """A family's models as another library stores them.

  Attributes:
    model_type: what that library's `config.json` calls them.
    read_config: `their config.json -> fields of our configuration`.
    write_config: `all fields of our configuration -> their config.json`.
    read: `({their name: array}, their config.json or {}) -> {path: array}`.
    write: `{path: array} -> {their name: array}`.
  """

  model_type: str
  read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
  write_config: Callable[[Mapping[str, Any]], dict[str, Any]]
  read: Callable[..., dict[typing.Path, np.ndarray]]
  write: Callable[..., dict[str, np.ndarray]]
