# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which parameters of flax's modules are linear maps, and what they are given.

The rows that a kernel is given are laid as the kernel lies: flattened over its
input axes, the output is `rows @ kernel.reshape(in, out)`.
"""

from collections.abc import Callable, Mapping
import inspect
import math
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from flax.linen import linear as flax_linear
import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import typing
from mergejax.nn import moe


class Stacked(NamedTuple):
  """What a stack of kernels is given, each rows of its own.

  Attributes:
    rows: `<float>[stack, ..., in]`; 0 where there is nothing.
  """

  rows: typing.Array


# <float>[..., in]; what costs something may be a function without arguments.
Inputs = typing.Array | Callable[[], typing.Array | Stacked]


class Describe(Protocol):
  """Tells of a call which linear maps it makes: `[(parameter, inputs)]`."""

  def __call__(
    self, module: Any, method: str, arguments: tuple[Any, ...], /
  ) -> list[tuple[str, Inputs]]: ...


# Their kernels look at patches of positions.
CONVOLUTIONS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose)
# Their layers compute with other numbers than those that are stored.
REWRITING = (nn.WeightNorm, nn.SpectralNorm)


def name_of(module: nn.Module) -> str:
  """How messages call a module: its path, or the class of the outermost."""
  return '/'.join(module.path) or f'the model ({type(module).__name__})'


def _dense(module, method, arguments, /) -> list[tuple[str, Inputs]]:
  del module
  return [('kernel', arguments[0])] if method == '__call__' else []


def _dense_general(module, method, arguments, /) -> list[tuple[str, Inputs]]:
  if method != '__call__':
    return []

  def laid():
    if module.batch_dims not in ((), None):
      raise errors.StructureError(
        f'{name_of(module)} has batch_dims={module.batch_dims}: it is many '
        'linear maps, which have no single input. Leave it out with `exclude`.'
      )
    inputs = arguments[0]
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    # Flax sorts them, and so lies the kernel.
    axes = sorted(axis % inputs.ndim for axis in axes)
    rest = [i for i in range(inputs.ndim) if i not in axes]
    size = math.prod(inputs.shape[i] for i in axes)
    moved = jnp.transpose(inputs, rest + axes)
    return moved.reshape(*(inputs.shape[i] for i in rest), size)

  return [('kernel', laid)]


def _conv(module, method, arguments, /) -> list[tuple[str, Inputs]]:
  if method != '__call__':
    return []
  return [('kernel', lambda: _patches(module, arguments[0]))]


def _patches(module, inputs):
  """What each position of a convolution's output sees, `[..., in]`."""
  if module.feature_group_count != 1 or module.mask is not None:
    what = 'masked' if module.feature_group_count == 1 else 'grouped'
    raise errors.StructureError(
      f'{name_of(module)} is a {what} convolution: no single input answers for '
      'its whole kernel. Leave it out with `exclude`.'
    )
  window = module.kernel_size
  window = (window,) if isinstance(window, int) else tuple(window)
  rank = len(window)
  each = lambda value: (value,) * rank if isinstance(value, int) else value
  dilation = each(module.kernel_dilation or 1)
  lead = inputs.shape[: inputs.ndim - rank - 1]
  inputs = inputs.reshape(-1, *inputs.shape[len(lead) :])
  inputs, padding = _padded(inputs, module.padding, window, dilation)
  letters = 'ABDEFGHJ'[:rank]
  dims = f'N{letters}C', f'{letters}IO', f'N{letters}C'
  patches = jax.lax.conv_general_dilated_patches(
    inputs, window, each(module.strides or 1), padding,
    each(module.input_dilation or 1), dilation, dims,
    precision=jax.lax.Precision.HIGHEST,
  )  # fmt: skip
  # Patches come channel by channel; a kernel has its channels last.
  places = patches.shape[1:-1]
  patches = patches.reshape(*patches.shape[:-1], inputs.shape[-1], -1)
  return jnp.swapaxes(patches, -1, -2).reshape(*lead, *places, -1)


def _padded(inputs, padding, window, dilation):
  """`(inputs, padding)` in the words of `jax.lax`, as flax pads."""
  padding = flax_linear.canonicalize_padding(padding, len(window))
  reach = [(size - 1) * by for size, by in zip(window, dilation)]
  if padding in ('CIRCULAR', 'REFLECT'):
    mode = 'wrap' if padding == 'CIRCULAR' else 'reflect'
    around = [(n // 2, n - n // 2) for n in reach]
    return jnp.pad(inputs, [(0, 0), *around, (0, 0)], mode), 'VALID'
  if padding == 'CAUSAL':
    return jnp.pad(inputs, [(0, 0), (reach[0], 0), (0, 0)]), 'VALID'
  return inputs, padding


def _embed(module, method, arguments, /) -> list[tuple[str, Inputs]]:
  del module
  return [('embedding', arguments[0])] if method == 'attend' else []


def _experts(module, method, arguments, /) -> list[tuple[str, Inputs]]:
  del module
  if method != '__call__':
    return []
  values, dispatch = arguments
  return [('kernel', lambda: Stacked(dispatch.by_expert(values)))]


LINEAR: Mapping[Any, Describe] = {
  moe.ExpertKernel: _experts,
  nn.Dense: _dense,
  nn.DenseGeneral: _dense_general,
  nn.Conv: _conv,
  nn.Embed: _embed,
}


def describe(
  context: nn.module.InterceptorContext,
  arguments: tuple,
  named: Mapping[str, typing.Array],
  kernels: Mapping[type, Describe],
) -> list[tuple[str, Inputs]]:
  """The linear maps of a call, and what they are given.

  Args:
    context: of an intercepted method.
    arguments: its positional arguments.
    named: its arguments by name.
    kernels: further classes, which go before flax's.

  Returns:
    `[(parameter, inputs)]`.
  """
  table = {**LINEAR, **kernels}
  # What a user says of a class goes before what holds for its parents.
  for kind in type(context.module).__mro__:
    if kind in table:
      if named:
        bound = inspect.signature(context.orig_method).bind(*arguments, **named)
        arguments = bound.args
      return table[kind](context.module, context.method_name, arguments)
  return []
