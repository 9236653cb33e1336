# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Precision decisions, in one place."""

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import typing


def is_averaged(dtype) -> bool:
  """True for floating dtypes: step counters and ids are never averaged."""
  return jnp.issubdtype(dtype, jnp.floating)


def accumulation_dtype(dtype) -> np.dtype:
  """float64 for float64 if JAX has it enabled, float32 for every other float.

  bfloat16 keeps about three digits of a weight: the difference of two such
  weights must be formed after the cast, or small task vectors vanish.
  """
  wide = np.float64 if dtype == np.float64 else np.float32
  return jax.dtypes.canonicalize_dtype(wide)


def widen(leaf: typing.Array) -> typing.Array:
  """Casts a floating leaf to its accumulation dtype."""
  return jnp.asarray(leaf, accumulation_dtype(leaf.dtype))
