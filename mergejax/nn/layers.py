# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Layers of the T5 family: kernels, MLP, norm; see also `attention`.

Parameter names and shapes are those of T5X's minimal T5, so that checkpoints
load without a map: every kernel is stored 2-D (`query/kernel` is
`[embed, heads * head_dim]`), there is no bias vector anywhere, and one
relative-position table `[heads, buckets]` serves a whole stack.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer" (2020), https://arxiv.org/abs/1910.10683.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing


# Fan-in is that of the stored 2-D kernel. The attention logits carry no
# 1/sqrt(head_dim); the initial query kernel does (see `Attention`).
def attention_init(scale: float = 1.0) -> Callable:
  """Fresh kernels of attention: variance `scale / in`."""
  return initializers.variance_scaling(scale, 'fan_in', 'normal')


def mlp_init(scale: float = 1.0) -> Callable:
  """Fresh kernels of everything else, cut off at two deviations."""
  return initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')


def flat_dot_general(
  inputs: typing.Array,
  kernel: typing.Array,
  dimension_numbers,
  precision=None,
  preferred_element_type=None,
) -> typing.Array:
  """`inputs [..., in] x kernel [in, out]` as one two-dimensional product.

  Same values as `jax.lax.dot_general`. With `[batch, length, in]` operands XLA
  contracts the kernel gradient over two axes and, on CPU, fuses the activation
  into it; flattening first makes a T5 MLP 1.7 times faster there, forward and
  backward, and changes nothing on other backends.
  """
  del dimension_numbers  # `nn.Dense` always contracts the last axis.
  product = jax.lax.dot_general(
    inputs.reshape(-1, inputs.shape[-1]),
    kernel,
    (((1,), (0,)), ((), ())),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return product.reshape(*inputs.shape[:-1], kernel.shape[-1])


def dense(
  features: int, dtype: str, kernel_init: Callable, name: str
) -> nn.Dense:
  """A kernel `[in, features]` without bias, as all of T5's."""
  return nn.Dense(
    features,
    use_bias=False,
    dtype=dtype,
    kernel_init=kernel_init,
    dot_general=flat_dot_general,
    name=name,
  )


class Mlp(nn.Module):
  """Feed-forward block: `wo(prod_i activation_i(wi_i x))`.

  One activation gives one kernel `wi` (T5 1.0: `('relu',)`); several give
  `wi_0, wi_1, ...` whose activated outputs are multiplied (T5 1.1:
  `('gelu', 'linear')`, gelu in its tanh form).

  Attributes:
    hidden: size of the hidden layer.
    activations: names from `jax.nn`, or `'linear'`.
    dtype: compute dtype.
    dropout_rate: dropout of the hidden layer, one mask along length.
    init_scale: variance of fresh kernels times their inputs.

  Raises:
    ConfigError: an unknown activation.
  """

  hidden: int
  activations: Sequence[str] = ('relu',)
  dtype: str = 'float32'
  dropout_rate: float = 0.0
  init_scale: float = 1.0

  @nn.compact
  def __call__(
    self, inputs: typing.Array, *, deterministic: bool = True
  ) -> typing.Array:
    """`<dtype>[batch, length, embed] -> <dtype>[batch, length, embed]`."""
    hidden, init = None, mlp_init(self.init_scale)
    for i, activation in enumerate(self.activations):
      name = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      branch = activation_of(activation)(
        dense(self.hidden, self.dtype, init, name)(inputs)
      )
      hidden = branch if hidden is None else hidden * branch
    hidden = partition.constrain(hidden, ('batch', 'length', 'mlp'))
    hidden = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      hidden, deterministic=deterministic
    )
    return dense(inputs.shape[-1], self.dtype, init, 'wo')(hidden)


def activation_of(name: str) -> Callable[[typing.Array], typing.Array]:
  """An activation by its name in `jax.nn`, or `'linear'`."""
  if name == 'linear':
    return lambda x: x
  found = getattr(jax.nn, name, None)
  if not callable(found):
    known = ['linear', *(n for n in dir(jax.nn) if not n.startswith('_'))]
    raise errors.ConfigError(errors.near(name, known, 'activation'))
  return found


class RMSNorm(nn.Module):
  """T5's layer norm: `x / sqrt(mean(x^2) + epsilon) * scale`, no mean removed.

  The norm is taken in float32 and cast before it is scaled, as in T5X;
  `flax.linen.RMSNorm` scales first, which differs in bfloat16.

  Attributes:
    dtype: dtype of the result.
    epsilon: keeps a zero vector finite.
  """

  dtype: str = 'float32'
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: typing.Array) -> typing.Array:
    """`<dtype>[..., embed] -> <dtype>[..., embed]`."""
    scale = self.param(
      'scale', initializers.ones, (x.shape[-1],), jnp.float32
    ).astype(self.dtype)
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
    normed = normed.astype(self.dtype)
    return normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))
