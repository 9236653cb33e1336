# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of the inputs of linear maps, for RegMean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import statistic_specs
from mergejax.core import tree as tree_lib
from mergejax.intercept import capture
from mergejax.intercept import linear
from mergejax.statistics import base

_HIGHEST = jax.lax.Precision.HIGHEST
# A symmetric matrix is computed and summed in strips of rows, each up to the
# diagonal: of so many strips five eighths of the products remain. Thinner ones
# leave out more, and cost more than that saves.
_STRIPS, _LEAST_ROWS = 4, 128


def gram(
  *,
  include: Sequence[str] | None = None,
  exclude: Sequence[str] = (),
  conv: bool = False,
  tied_head: bool = False,
  mask: capture.Mask | None = None,
  kernels: Mapping[type, linear.Describe] | None = None,
  apply: Callable[..., Any] | None = None,
) -> base.Statistic:
  """The statistic `mean over real positions of x x^T` of every linear map.

  `G = X^T X / n` with X the inputs of a kernel, all positions stacked; sums in
  float32 at the highest precision whatever the model computes in.

  Args:
    include: full-match regular expressions of parameters; by default every
      `kernel`, multi-head, stacked (scanned) and expert kernels among them.
    exclude: expressions to leave out.
    conv: also convolutions (`nn.Conv`, of any number of dimensions), whose
      inputs are patches, `[height * width * channels]` as the kernel lies; off
      by default, as in the paper. With `include` they are what that says.
    tied_head: also an embedding that is the output head; averaged by default.
    mask: `(path, batch) -> weights` of the input rows of a layer, 0 for padding,
      fractions count as such: `G = sum w x x^T / sum w`. The default goes by
      what the model's family says (`ModelFamily.mask`), or, without one, by the
      names in a batch: seqio's for text, `weights` for anything else; where it
      finds neither, all rows count, with a warning.
    kernels: `{module class: describe}` for linear maps of other layers;
      `describe(module, method name, arguments) -> [(parameter, inputs)]`.
    apply: `(module, params, batch) -> variables`, for modules that are called
      otherwise than their family does; must allow `mutable=
      ['intermediates']`.

  Returns:
    A statistic for `collect`, whose result has `gram <float32>[(stack,) in,
    in]` and `count`, the rows seen (their summed weights), for each kernel.
    Collecting raises a UserError for a kernel that was asked for and not seen,
    and for convolutions that are grouped or masked.

  Source: Jin et al. (2023), https://arxiv.org/abs/2212.09849, section 3.2. The
  released code counts padding and keeps dropout as it finds it; this does not.
  """
  with_convolutions = conv or include is not None

  def measure(module, params, batch, number, shards):
    del number
    specs = tree_lib.specs(params)
    asked = capture.wanted_kernels(specs, include, exclude, tied_head=tied_head)
    weigh = capture.mask_for(mask, module, batch)
    known, met = {}, capture.Met()

    def reduce(path, inputs):
      weights = weigh(path, batch)
      # Layers that are given one array share its Gram matrix (which rows of it
      # are real does not depend on who reads them), if they do so in one trace:
      # what was computed inside of a loop must not leave it.
      key = id(inputs), weights if isinstance(weights, str) else ''
      previous = known.get(key)
      if previous is not None and _trace(previous[1]['sum'][0]) is _trace(
        inputs
      ):
        return previous[1]
      rows = capture.row_weights(weights, inputs, path)
      found = _products(path, inputs, rows, shards)
      known[key] = inputs, found
      return found

    found = capture.inputs_of(
        module, params, batch, reduce, wanted=set(asked).__contains__,
        convolutions=with_convolutions, kernels=kernels, apply=apply, met=met,
    )  # fmt: skip
    if not with_convolutions:
      left = met.convolutions - met.maps
      asked = [path for path in asked if path not in left]
    capture.check_seen(asked, found, met, specs)
    # Lifted layers put their stack in front of the shards.
    return {path: _in_front(own) for path, own in found.items()}

  settings = {
    'include': include and list(include), 'exclude': list(exclude),
    'conv': conv, 'tied_head': tied_head,
  }  # fmt: skip
  functions: dict[str, Any] = {'mask': mask, 'apply': apply}
  for kind, describe in (kernels or {}).items():
    functions[f'kernels of {kind.__name__}'] = describe
  return base.Statistic(
    statistic_specs.GRAM, measure, _whole, settings, functions
  )


def _trace(array):
  """The trace that an array belongs to; None for a number."""
  return getattr(array, '_trace', None)


def _in_front(own):
  """Moves the axis of shards to the front, where it is not there yet."""
  return {
    'sum': tuple(jnp.moveaxis(strip, -3, 0) for strip in own['sum']),
    'count': jnp.moveaxis(own['count'], -1, 0),
  }


def _products(path, inputs, weights, shards):
  """`{'sum': strips, 'count': [shards]}` of one call of a layer."""
  size = inputs.shape[-1]
  if inputs.ndim < 2 or inputs.shape[0] % shards:
    raise errors.DataError(
      f'The inputs of {path} are {list(inputs.shape)}; their first axis should '
      f'be the rows of a batch, to be shared by {shards} device(s).'
    )
  # [batch, ..., in] -> [shards, rows, in]: no row leaves its device.
  rows = inputs.astype(jnp.float32).reshape(shards, -1, size)
  if weights is None:
    count = jnp.full((shards,), rows.shape[1], jnp.float32)
    weighted = rows
  else:
    weights = weights.reshape(shards, -1)
    count = jnp.sum(weights, axis=1)
    # What stands in padding is arbitrary, even infinite.
    rows = jnp.where(weights[..., None] > 0, rows, 0.0)
    weighted = rows * weights[..., None]
  return {'sum': _strips(rows, weighted), 'count': count}


def _strips(rows, weighted):
  """Rows of `rows^T weighted`, symmetric, each strip up to its diagonal block.

  `([shards, step, end], ...)`: the first strip has `step` columns, the last
  all of them.
  """
  size = rows.shape[-1]
  step = max(-(-size // _STRIPS), _LEAST_ROWS)
  if size < 2 * _LEAST_ROWS:
    step = size
  return tuple(
    jnp.einsum(
      'sri,srj->sij',
      rows[..., start : start + step],
      weighted[..., : start + step],
      precision=_HIGHEST,
    )
    for start in range(0, size, step)
  )


def _whole(strips):
  """The symmetric matrix `<float>[..., in, in]` from its strips."""
  size = strips[-1].shape[-1]
  lower = np.zeros((*strips[-1].shape[:-2], size, size), strips[-1].dtype)
  start = 0
  for strip in strips:
    end = start + strip.shape[-2]
    lower[..., start:end, :end] = strip
    start = end
  below = np.tril(lower, -1)
  return np.tril(lower) + np.swapaxes(below, -1, -2)
