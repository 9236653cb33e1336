# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers, through optax, with the settings of the papers."""

import optax

from mergejax.train import schedules


def adafactor(
  learning_rate: float | schedules.Schedule,
  *,
  decay_rate: float = 0.8,
  step_offset: int = 0,
  momentum: float | None = None,
  clipping_threshold: float = 1.0,
  max_gradient_norm: float | None = None,
) -> optax.GradientTransformation:
  """Adafactor as T5 uses it: relative updates, factored second moments.

  The update of a parameter is scaled by its root mean square (at least 1e-3),
  so one learning rate serves embeddings of scale 1 and small kernels alike.

  Args:
    learning_rate: relative step size; T5 pre-trains with `1/sqrt(max(t, 1e4))`
      and fine-tunes with 0.001.
    decay_rate: second moments decay by `1 - (t + 1)^-decay_rate`.
    step_offset: steps already made elsewhere, subtracted in that formula.
    momentum: off, as in T5.
    clipping_threshold: limit of an update's root mean square.
    max_gradient_norm: clip the global gradient norm first; off, as in T5.

  Returns:
    An optax transformation. Matrices whose sides are both at least 128 are
    factored.

  Source: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235.
  """
  return _clipped(
    optax.adafactor(
      learning_rate,
      min_dim_size_to_factor=128,
      decay_rate=decay_rate,
      decay_offset=step_offset,
      multiply_by_parameter_scale=True,
      clipping_threshold=clipping_threshold,
      momentum=momentum,
    ),
    max_gradient_norm,
  )


def adamw(
  learning_rate: float | schedules.Schedule,
  *,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-7,
  weight_decay: float = 0.1,
  max_gradient_norm: float | None = 0.1,
) -> optax.GradientTransformation:
  """AdamW with the settings of Branch-Train-Merge's released scripts.

  Args:
    learning_rate: peak 5e-4 there.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay, on every parameter.
    max_gradient_norm: clip the global gradient norm first; None for no clip.

  Source: Li et al., "Branch-Train-Merge" (2022),
  https://arxiv.org/abs/2208.03306; Loshchilov and Hutter (2019).
  """
  return _clipped(
    optax.adamw(
      learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay
    ),
    max_gradient_norm,
  )


def _clipped(optimizer, max_gradient_norm):
  if max_gradient_norm is None:
    return optimizer
  return optax.chain(optax.clip_by_global_norm(max_gradient_norm), optimizer)
