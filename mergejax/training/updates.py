# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small optax transformations that optax has not, or has in more passes."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import optax


def scale_by_clipped_factored_rms(
  factored: bool,
  decay_rate: float,
  step_offset: int,
  min_dim_size_to_factor: int,
  epsilon: float,
  clipping_threshold: float | None,
) -> optax.GradientTransformation:
  """`optax.scale_by_factored_rms`, then `clip_by_block_rms`, in few passes.

  For a matrix g of n rows and m columns, r and c being the decayed means of
  the rows and of the columns of g^2 + epsilon:

      u_ij = g_ij sqrt(mean(r) / (r_i c_j))
      u / max(1, rms(u) / threshold),  n m rms(u)^2 = mean(r) (1/r)^T g^2 (1/c)

  The update is thus not written down to learn its size, and products of g^2
  with vectors read it once each, where XLA writes down what a mean is made of.

  Args:
    factored: as in optax, like the next four.
    decay_rate: moments decay by `1 - (t + 1)^-decay_rate`.
    step_offset: subtracted from t.
    min_dim_size_to_factor: the second largest axis must be this long.
    epsilon: added to squared gradients.
    clipping_threshold: limit of an update's root mean square; None: no limit.

  Returns:
    A transformation; its state is an `optax.FactoredState`.

  Example:
    >>> scale = scale_by_clipped_factored_rms(True, 0.8, 0, 2, 1e-30, 0.5)
    >>> grads = {'kernel': jnp.ones((2, 4))}
    >>> updates, state = scale.update(grads, scale.init(grads), grads)
    >>> round(float(updates['kernel'][0, 0]), 3), state.v_col['kernel'].shape
    (0.5, (4,))

  Source: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235, algorithms
  4 to 6.
  """
  init = optax.scale_by_factored_rms(
    factored, decay_rate, step_offset, min_dim_size_to_factor, epsilon
  ).init

  def leaf(grad, param, row, column, full, decay):
    def decayed(moment, squares):
      return decay * moment + (1 - decay) * (squares + epsilon)

    if full.shape == param.shape:
      full = decayed(full, jnp.square(grad))
      scaled = grad * jax.lax.rsqrt(full)
      size = jnp.mean(jnp.square(scaled))
    else:
      scaled, size, row, column = _by_rows_and_columns(
        grad, row, column, decayed
      )
    if clipping_threshold is not None:
      scaled = scaled / jnp.maximum(1.0, jnp.sqrt(size) / clipping_threshold)
    return scaled, row, column, full

  def update(grads, state, params):
    time = (state.count - step_offset).astype(jnp.float32) + 1
    decay = 1 - time**-decay_rate
    structure = jax.tree.structure(grads)
    trees = grads, params, state.v_row, state.v_col, state.v
    moved = [
      leaf(*leaves, decay) for leaves in zip(*map(jax.tree.leaves, trees))
    ]
    updates, *moments = (
      structure.unflatten([each[i] for each in moved]) for i in range(4)
    )
    count = optax.safe_increment(state.count)
    return updates, optax.FactoredState(count, *moments)

  return optax.GradientTransformation(init, update)


def _by_rows_and_columns(grad, row, column, decayed):
  """The scaled gradient, its mean square, and the moments it is scaled by.

  As in optax, `row` lacks the largest axis and `column` the second largest.
  """
  *_, second, first = np.argsort(grad.shape)
  names = string.ascii_lowercase[: grad.ndim]
  of_row, of_column = (names.replace(names[i], '') for i in (first, second))
  squares = jnp.square(grad)

  def mean(axis, kept):
    weights = jnp.full(grad.shape[axis], 1 / grad.shape[axis], grad.dtype)
    return _product(f'{names},{names[axis]}->{kept}', squares, weights)

  row = decayed(row, mean(first, of_row))
  column = decayed(column, mean(second, of_column))
  by_row = jnp.mean(row, of_row.index(names[second]), keepdims=True) / row
  by_column = 1 / column
  sums = _product(f'{names},{of_column}->{of_row}', squares, by_column)
  scaled = (
    grad
    * jnp.expand_dims(jnp.sqrt(by_row), first)
    * jnp.expand_dims(jnp.sqrt(by_column), second)
  )
  return scaled, jnp.sum(sums * by_row) / grad.size, row, column


def _product(equation, matrix, vector):
  return jnp.einsum(equation, matrix, vector, precision='highest')


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
