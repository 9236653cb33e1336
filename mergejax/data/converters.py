# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a batch holds besides tokens and their weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf

Spec = seqio.FeatureConverter.FeatureSpec


class Extra(NamedTuple):
  """One more feature of examples, and what batches have of it.

  Attributes:
    feature: its name in an example.
    spec: of it.
    length: to which it is cut and padded, a number an axis.
    arrays: `{name in a batch: its spec}`, of one row.
    lengths: `{name in a batch: positions of a row}`; of a scalar any number.
    make: from the padded features of an example to those arrays.
  """

  feature: str
  spec: Spec
  length: int | tuple[int, ...]
  arrays: Mapping[str, Spec]
  lengths: Mapping[str, int]
  make: Callable[[Mapping[str, tf.Tensor]], Mapping[str, tf.Tensor]]


def extended(
  kind: type[seqio.FeatureConverter], pack: bool, extras: Sequence[Extra]
) -> seqio.FeatureConverter:
  """A converter of a kind whose batches have the arrays of `extras` too."""

  class Extended(kind):
    """Makes its own arrays of the features, and those of the extras."""

    TASK_FEATURES = {
      **kind.TASK_FEATURES,
      **{each.feature: each.spec for each in extras},
    }
    MODEL_FEATURES = {
      **kind.MODEL_FEATURES,
      **{name: spec for each in extras for name, spec in each.arrays.items()},
    }

    def _convert_example(self, features):
      found = dict(super()._convert_example(features))
      for each in extras:
        found |= each.make(features)
      return found

    def get_model_feature_lengths(self, task_feature_lengths):
      found = dict(super().get_model_feature_lengths(task_feature_lengths))
      for each in extras:
        found |= each.lengths
      return found

  # Whether lengths are right is checked for one axis alone.
  flat = all(isinstance(each.length, int) for each in extras)
  return Extended(pack=pack, apply_length_check=flat)
