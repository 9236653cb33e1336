# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention by the kernels of JAX and of accelerators, by name.

T5 adds a learned bias to the logits, so a kernel must take a bias of every
query and key and give its gradient. These do:

- 'xla': `jax.nn.dot_product_attention` as XLA compiles it. Everywhere.
- 'cudnn': the same by cuDNN's flash attention, on NVIDIA's GPUs from Ampere on,
  in bfloat16 or float16.
- 'flash': the Pallas kernel of JAX on TPUs. Its bias is laid out whole,
  `[batch, heads, query, key]`, and so is the bias's gradient: it saves the
  softmax, not the memory of what it is over.

JAX's splash attention, on TPUs, takes no bias and is not among them. All sum
logits in float32. None drops attention probabilities.
"""

from collections.abc import Callable
import math

import jax
from jax.experimental.pallas.ops.tpu import flash_attention
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing

# What `attention.Attention` computes by itself.
REFERENCE = 'reference'
# Added to float32 logits where attention is not allowed. Large enough to
# swallow any logit, finite so that a row with nothing allowed stays finite.
MASKED = -1e10
# A block of TPUs: lengths are filled up to a multiple of it.
_BLOCK = 128

_HEADS = ('batch', None, 'heads', None)


def check(name: str) -> None:
  """Raises a `ConfigError` for a kernel that there is not."""
  if name not in KERNELS:
    raise errors.ConfigError(
      errors.near(str(name), KERNELS, 'attention kernel')
    )


def attend(
  name: str,
  query: typing.Array,
  key: typing.Array,
  value: typing.Array,
  bias: typing.Array | None,
) -> typing.Array:
  """`softmax(q k^T + bias) v` by the kernel of a name.

  Args:
    name: of `KERNELS`, but 'reference'.
    query: `<dtype>[batch, query, heads, head_dim]`.
    key: `<dtype>[batch, key, heads, head_dim]`.
    value: likewise.
    bias: `<float>[1 | batch, 1 | heads, query, key]`, or None; masks are in it.

  Returns:
    `<dtype>[batch, query, heads, head_dim]`.

  Raises:
    ConfigError: an unknown kernel, or one that does not run here, or not in
      these shapes or this dtype.
  """
  check(name)
  if bias is not None:
    bias = bias.astype(query.dtype)
  return KERNELS[name](query, key, value, bias)


def _reference(query, key, value, bias):
  del query, key, value, bias
  raise errors.ConfigError(
    "The attention kernel 'reference' is that of attention.Attention itself."
  )


def _of_jax(query, key, value, bias, implementation):
  # It promotes bfloat16 by itself, also where a user forbids that.
  with jax.numpy_dtype_promotion('standard'):
    return jax.nn.dot_product_attention(
      query, key, value, bias, scale=1.0, implementation=implementation
    )


def _xla(query, key, value, bias):
  return _of_jax(query, key, value, bias, 'xla')


def _cudnn(query, key, value, bias):
  _check_platform('cudnn', 'gpu', 'cuda')
  try:
    return _of_jax(query, key, value, bias, 'cudnn')
  except (NotImplementedError, RuntimeError, ValueError) as error:
    raise errors.ConfigError(
      "attention_kernel='cudnn' does not take "
      f'{query.dtype}{list(query.shape)}: {errors.first_line(error)} It takes '
      "bfloat16 and float16, heads of 8, 16, ... up to 128; 'xla' takes all."
    ) from error


def _flash(query, key, value, bias):
  _check_platform('flash', 'tpu')
  head_dim = query.shape[-1]
  if head_dim > _BLOCK and head_dim % _BLOCK:
    raise errors.ConfigError(
      f"attention_kernel='flash' does not take heads of {head_dim}: up to "
      f"{_BLOCK}, or a multiple of it; 'xla' takes all."
    )
  batch, heads = query.shape[0], query.shape[2]
  shape = batch, heads, query.shape[1], key.shape[1]
  if bias is None:
    bias = jnp.zeros((1, 1, *shape[2:]), query.dtype)
  axes = [_HEADS, _HEADS, _HEADS, ('batch', 'heads', None, None)]
  bias = jnp.broadcast_to(bias, shape)
  return partition.by_shard(_flash_shard, axes, _HEADS)(query, key, value, bias)


def _flash_shard(query, key, value, bias):
  """On one device: lengths are filled up, with keys that nobody sees."""
  length = query.shape[1]
  fill = lambda x, axis: _filled(x, axis, 0)
  query, key, value = (fill(x, 1) for x in (query, key, value))
  # Below what masks add, so that a query that sees nothing real sees none of
  # these either.
  bias = _filled(fill(bias, 2), 3, 2 * MASKED)
  heads_first = lambda x: jnp.swapaxes(x, 1, 2)
  found = flash_attention.flash_attention(
    heads_first(query), heads_first(key), heads_first(value), bias
  )
  return heads_first(found)[:, :length]


def _filled(x, axis, value):
  missing = math.ceil(x.shape[axis] / _BLOCK) * _BLOCK - x.shape[axis]
  widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value) if missing else x


def _check_platform(name, *platforms):
  """Raises where a kernel is traced for devices that do not have it."""
  here = partition.platform()
  if here not in platforms:
    raise errors.ConfigError(
      f'attention_kernel={name!r} is a kernel of {platforms[0].upper()}s, and '
      f"this is for {here}: take 'xla' or {REFERENCE!r}, which run everywhere. "
      'The weights are the same under all of them.'
    )


KERNELS: dict[str, Callable[..., typing.Array]] = {
  REFERENCE: _reference,
  'xla': _xla,
  'cudnn': _cudnn,
  'flash': _flash,
}
