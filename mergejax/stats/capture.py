# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Watches what the linear maps of any linen model are given.

Methods are intercepted, so the model stays as it is. What a map sees is left
in the collection `intermediates` under the map's own scope, so that scanned
and vmapped layers work if they lift that collection.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import re
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import errors
from mergejax import models
from mergejax import typing

COLLECTION = 'intermediates'
_MARK = 'inputs_of_'

# (module, method name, arguments) -> [(parameter, inputs [..., in])]
Describe = Callable[[nn.Module, str, tuple], list[tuple[str, typing.Array]]]
# (path, batch) -> weight of every input row, None for all, or NONZERO.
Mask = Callable[[typing.Path, Mapping[str, Any]], Any]
# Rows that are not all zero: slots of an expert that hold a token.
NONZERO = 'nonzero'


def _dense(module, method, arguments):
  if method != '__call__':
    return []
  return [('kernel', arguments[0])]


def _dense_general(module, method, arguments):
  if method != '__call__':
    return []
  inputs = arguments[0]
  axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
  axes = [axis % inputs.ndim for axis in axes]
  rest = [i for i in range(inputs.ndim) if i not in axes]
  size = math.prod(inputs.shape[i] for i in axes)
  moved = jnp.transpose(inputs, rest + axes)
  return [('kernel', moved.reshape(*(inputs.shape[i] for i in rest), size))]


def _conv(module, method, arguments):
  if method != '__call__':
    return []
  inputs = arguments[0]
  if module.feature_group_count != 1:
    raise errors.UserError(
      f'{"/".join(module.path)} is a grouped convolution, which has no single '
      'input; leave it out with `exclude`.'
    )
  window = module.kernel_size
  window = (window,) if isinstance(window, int) else tuple(window)
  rank = len(window)
  each = lambda value: (value,) * rank if isinstance(value, int) else value
  dims = ('NWC', 'NHWC', 'NDHWC')[rank - 1], ('WIO', 'HWIO', 'DHWIO')[rank - 1]
  patches = jax.lax.conv_general_dilated_patches(
    inputs,
    window,
    each(module.strides or 1),
    module.padding,
    each(module.input_dilation or 1),
    each(module.kernel_dilation or 1),
    (dims[0], dims[1], dims[0]),
  )
  # Patches come channel by channel; a kernel has its channels last.
  channels = inputs.shape[-1]
  patches = patches.reshape(*patches.shape[:-1], channels, -1)
  patches = jnp.swapaxes(patches, -1, -2)
  return [('kernel', patches.reshape(*patches.shape[:-2], -1))]


def _embed(module, method, arguments):
  return [('embedding', arguments[0])] if method == 'attend' else []


# Which parameter of a module is a linear map, and what it is given.
LINEAR: Mapping[type, Describe] = {
  nn.Dense: _dense,
  nn.DenseGeneral: _dense_general,
  nn.Conv: _conv,
  nn.Embed: _embed,
}


def _describe(module, method, arguments, kernels):
  for kind, describe in {**LINEAR, **kernels}.items():
    if isinstance(module, kind):
      return describe(module, method, arguments)
  return []


def default_mask(path: typing.Path, batch: Mapping[str, Any]) -> Any:
  """Which input rows are real, for the models of this project.

  Cross-attention reads the encoder's positions with its keys and values.

  Args:
    path: of the parameter.
    batch: by the names of seqio, or images with optional `weights`.

  Returns:
    `<bool>[batch, length]` or `<bool>[batch]`, or None: all are.
  """
  if 'images' in batch:
    return None if 'weights' not in batch else batch['weights'] > 0
  if 'decoder_target_tokens' not in batch:
    return None
  from_encoder = re.fullmatch(
    r'(.*/)?(encoder/.*|encoder_decoder_attention/(key|value)/.*)', path
  )
  if from_encoder and 'encoder_input_tokens' in batch:
    return batch['encoder_input_tokens'] > 0
  return batch['decoder_target_tokens'] > 0


def default_apply(module, params, batch):
  """One forward pass in evaluation mode, keeping what was left behind."""
  positional, named = models.arguments(batch)
  _, left = module.apply(
    models.variables(params), *positional, **named, mutable=[COLLECTION]
  )
  return left


def inputs_of(
  module: nn.Module,
  params: typing.Tree,
  batch: Mapping[str, Any],
  reduce: Callable[[typing.Path, typing.Array], Any],
  *,
  wanted: Callable[[typing.Path], bool],
  kernels: Mapping[type, Describe] | None = None,
  apply: Callable[..., Any] | None = None,
) -> dict[typing.Path, Any]:
  """Runs a model and reduces what each of its linear maps is given.

  Args:
    module: any linen module.
    params: its parameters.
    batch: as the module is called with, see `models.logits`.
    reduce: `(path, inputs <float>[..., in]) -> tree of arrays`, called while
      tracing; several calls of one layer are added up.
    wanted: which parameters to watch.
    kernels: further modules with linear maps: `{class: describe}`.
    apply: `(module, params, batch) -> variables left behind`, for modules that
      are called otherwise.

  Returns:
    `{path: what reduce gave}`; lifted layers have their stack in front.
  """

  def interceptor(call, arguments, named, context):
    found = _describe(
      context.module, context.method_name, arguments, kernels or {}
    )
    for name, inputs in found:
      path = '/'.join((*context.module.path, name))
      if wanted(path):
        _leave(context.module, name, reduce(path, inputs))
    return call(*arguments, **named)

  with nn.intercept_methods(interceptor):
    left = (apply or default_apply)(module, params, batch)
  found = {}
  for path, value in _walk(left.get(COLLECTION, {})):
    *scope, name = path
    if name.startswith(_MARK):
      found['/'.join((*scope, name.removeprefix(_MARK)))] = value
  return found


def _leave(module, name, value):
  module.sow(
    COLLECTION,
    _MARK + name,
    value,
    reduce_fn=lambda a, b: b if a is None else jax.tree.map(jnp.add, a, b),
    init_fn=lambda: None,
  )


def _walk(node, path=()):
  for name, value in node.items():
    if name.startswith(_MARK):
      yield (*path, name), value
    elif isinstance(value, (dict, flax.core.FrozenDict)):
      yield from _walk(value, (*path, name))


def wanted_kernels(
  specs: typing.SpecTree,
  include: Sequence[str] | None,
  exclude: Sequence[str],
  *,
  conv: bool = False,
  tied_head: bool = False,
) -> list[typing.Path]:
  """The parameters of linear maps that are asked for.

  Args:
    specs: of the model.
    include: full-match regular expressions; by default every `kernel`, without
      convolutions unless `conv`.
    exclude: full-match regular expressions to leave out.
    conv: also kernels of convolutions, whose inputs are patches.
    tied_head: also embeddings that are the output head as well.

  Raises:
    UserError: an expression that matches nothing.
  """
  for pattern in (*(include or ()), *exclude):
    if not any(re.fullmatch(pattern, path) for path in specs):
      raise errors.UserError(
        f'{pattern!r} matches no parameter. They begin with:\n'
        f'{errors.listed(list(specs), 5)}'
      )

  def asked(path, spec):
    if any(re.fullmatch(pattern, path) for pattern in exclude):
      return False
    if include is not None:
      return any(re.fullmatch(pattern, path) for pattern in include)
    name = path.rsplit('/', 1)[-1]
    if name == 'embedding':
      return tied_head
    return name == 'kernel' and (conv or len(spec.shape) != 4)

  return [
    path
    for path, spec in specs.items()
    if len(spec.shape) >= 2 and asked(path, spec)
  ]


def check_seen(
  asked: Sequence[typing.Path],
  seen: Sequence[typing.Path],
  specs: typing.SpecTree,
) -> None:
  """Compares what was asked for with what was seen.

  Raises:
    UserError: nothing was asked for, or a kernel was not seen.
  """
  if not asked:
    raise errors.UserError(
      'No parameter is the kernel of a linear map, or all are excluded: there '
      'is nothing to collect. They begin with:\n'
      f'{errors.listed(list(specs), 5)}'
    )
  missing = [path for path in asked if path not in seen]
  if missing:
    raise errors.UserError(
      f'{len(missing)} of {len(asked)} kernels were never seen at work:\n'
      f'{errors.listed(missing)}\n'
      f'A lifted layer hides them unless it lifts the collection {COLLECTION!r} '
      f"too: `nn.scan(..., variable_axes={{'params': 0, {COLLECTION!r}: 0}})`. "
      'Layers that do not use nn.Dense, nn.DenseGeneral or nn.Conv are told '
      'of with `kernels={MyLayer: describe}`. Or leave them out with `exclude`.'
    )


def row_weights(
  mask: Any, inputs: typing.Array, path: typing.Path
) -> typing.Array | None:
  """The weight of each row of `inputs`, `<float32>[...]`, or None for all.

  Raises:
    UserError: the mask is not of the inputs' leading axes.
  """
  if mask is None:
    return None
  if isinstance(mask, str):
    if mask != NONZERO:
      raise errors.UserError(errors.near(mask, [NONZERO], 'mask'))
    return jnp.any(inputs != 0, axis=-1).astype(jnp.float32)
  mask = jnp.asarray(mask)
  if inputs.shape[: mask.ndim] != mask.shape:
    raise errors.UserError(
      f'The inputs of {path} are {list(inputs.shape)}, but its mask is '
      f'{list(mask.shape)}: give the mask of the positions that this layer '
      'reads, with `mask=lambda path, batch: ...`.'
    )
  rest = (1,) * (inputs.ndim - 1 - mask.ndim)
  return jnp.broadcast_to(
    mask.reshape(*mask.shape, *rest), inputs.shape[:-1]
  ).astype(jnp.float32)
