# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small optax transformations that optax itself does not have."""

import jax
import jax.numpy as jnp
import optax


def scale_by_parameter_rms(
  least: float, most: float | None = None
) -> optax.GradientTransformation:
  """Multiplies an update by its parameter's root mean square, within limits.

  `u * min(max(rms(theta), least), most)`; the rest of a relative update.

  Args:
    least: a parameter of zeros could never leave zero without it; T5X's 1e-3.
    most: keeps parameters that have grown from growing faster; None: no limit.

  Returns:
    A transformation without a state, which is optax's where `most` is None.

  Example:
    >>> scale = scale_by_parameter_rms(1e-3, 0.5)
    >>> state = scale.init({})
    >>> float(scale.update(jnp.ones(2), state, jnp.full(2, 4.0))[0][0])
    0.5
  """
  if most is None:
    return optax.scale_by_param_block_rms(least)

  def scaled(update, param):
    rms = jnp.sqrt(jnp.mean(jnp.square(param)))
    return update * jnp.clip(rms, least, most)

  def update(updates, state, params):
    return jax.tree.map(scaled, updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def skip_nan(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An optimizer whose numbers that would be NaN keep their old values.

  Each by itself, in the parameters and in the optimizer's state. The steps of
  `transforms.skip_nonfinite` are skipped whole instead, which also keeps what
  is finite from following half a gradient.

  Args:
    optimizer: any; its state stays as it is laid out.

  Source: T5X `adafactor.py`, `skip_nan_updates`.
  """

  def kept(new, old):
    if not jnp.issubdtype(new.dtype, jnp.floating):
      return new
    return jnp.where(jnp.isnan(new), old, new)

  def moved(update, param):
    return jnp.where(jnp.isnan(param + update), 0.0, update)

  def update(updates, state, params):
    updates, new = optimizer.update(updates, state, params)
    return (
      jax.tree.map(moved, updates, params),
      jax.tree.map(kept, new, state),
    )

  return optax.GradientTransformation(optimizer.init, update)
