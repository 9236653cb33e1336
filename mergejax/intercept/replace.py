# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Changes what linear maps are given and give back, the module as it is.

The other half of `capture`: methods are intercepted, modules are met by the
path of their kernel, and what an edit makes of a call goes on in its place.
"""

from collections.abc import Callable, Mapping
import inspect
import math
from typing import Any, NamedTuple

import flax.linen as nn

from mergejax.core import errors
from mergejax.core import typing
from mergejax.intercept import linear


class Edit(NamedTuple):
  """What is changed of the calls of one linear map.

  Attributes:
    before: `(module, inputs <float>[..., in]) -> inputs` of the same shape.
    after: `(module, inputs <float>[..., in], outputs <float>[..., out]) ->
      outputs` of the same shape; the inputs are those after `before`.
  """

  before: Callable[[nn.Module, typing.Array], typing.Array] | None = None
  after: (
    Callable[[nn.Module, typing.Array, typing.Array], typing.Array] | None
  ) = None


def replacing(
  edits: Mapping[typing.Path, Edit],
  *,
  kernels: Mapping[type, linear.Describe] | None = None,
  seen: set[typing.Path] | None = None,
) -> Callable[..., Any]:
  """An interceptor, for `nn.intercept_methods`, that edits linear maps.

  Args:
    edits: by the path of the parameter, `encoder/layers_0/mlp/wi/kernel`; of
      layers that are scanned or vmapped that of their stack.
    kernels: further modules with linear maps, see `linear.Describe`; a call
      must give back what its map makes of the inputs, `[..., out]`.
    seen: filled with the paths that were met.

  Raises:
    StructureError: while tracing: two edited maps in one call, kernels of
      experts, or inputs that cannot be put back as the module takes them.
  """
  kernels = kernels or {}

  def interceptor(call, arguments, named, context):
    module = context.module
    found = []
    for name, inputs in linear.describe(context, arguments, named, kernels):
      path = '/'.join((*module.path, name))
      if path in edits:
        found.append((path, inputs))
    if not found:
      return call(*arguments, **named)
    if len(found) > 1:
      raise errors.StructureError(
        f'{linear.name_of(module)} makes several linear maps in one call '
        f'({errors.some([path for path, _ in found])}): which part of its '
        'result is whose is not known. Adapt one of them.'
      )
    path, inputs = found[0]
    if seen is not None:
      seen.add(path)
    edit = edits[path]
    if edit.before is None and edit.after is None:
      return call(*arguments, **named)
    laid: Any = inputs() if callable(inputs) else inputs
    if isinstance(laid, linear.Stacked):
      raise errors.StructureError(
        f'{path} is a stack of the kernels of experts, each with rows of its '
        'own, and cannot be edited as one map: leave it out, for example by '
        "(?!.*/expert/) at the beginning of an adapter's target."
      )
    if edit.before is not None:
      if named:
        bound = inspect.signature(context.orig_method).bind(*arguments, **named)
        arguments, named = bound.args, bound.kwargs
      laid = edit.before(module, laid)
      arguments = (_put_back(module, arguments[0], laid), *arguments[1:])
    outputs = call(*arguments, **named)
    if edit.after is None:
      return outputs
    return edit.after(module, laid, outputs)

  return interceptor


def _put_back(module, given, inputs):
  """Inputs `[..., in]` in the shape in which a module was given them."""
  if given.shape == inputs.shape:
    return inputs
  trailing = False
  if isinstance(module, nn.DenseGeneral):
    axes = module.axis if isinstance(module.axis, tuple) else (module.axis,)
    last = range(given.ndim - len(axes), given.ndim)
    trailing = sorted(axis % given.ndim for axis in axes) == list(last)
  if not trailing or math.prod(given.shape) != math.prod(inputs.shape):
    raise errors.StructureError(
      f'{linear.name_of(module)} takes its inputs in a form '
      f'{list(given.shape)} into which scaled ones {list(inputs.shape)} cannot '
      'be put back: adapt its output instead.'
    )
  return inputs.reshape(given.shape)
