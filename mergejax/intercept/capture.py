# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Watches what the linear maps of any linen model are given.

Methods are intercepted, so the model stays as it is. What a map sees is left
in the collection `intermediates` under the map's own scope, so that scanned
and vmapped layers work if they lift that collection.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import functools
import logging
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.intercept import linear
from mergejax.models import base

COLLECTION = 'intermediates'
_MARK = 'inputs_of_'

# (path, batch) -> weight of every input row, None for all, or NONZERO.
Mask = Callable[[typing.Path, Mapping[str, Any]], Any]
NONZERO = base.NONZERO


@dataclasses.dataclass
class Met:
  """What the trace of a model met, whether or not it could be kept.

  Attributes:
    maps: linear maps that were at work.
    convolutions: kernels of convolutions, of any kind.
    rewritten: `{path of a layer: class}` of layers whose kernels are computed
      from what is stored, by `nn.WeightNorm` for example.
  """

  maps: set[typing.Path] = dataclasses.field(default_factory=set)
  convolutions: set[typing.Path] = dataclasses.field(default_factory=set)
  rewritten: dict[typing.Path, str] = dataclasses.field(default_factory=dict)


def mask_for(
  mask: Mask | None,
  model: nn.Module | models.ModelFamily,
  batch: Mapping[str, Any],
) -> Mask:
  """A caller's mask, or the family's; warns where padding cannot be known."""
  if mask is not None:
    return mask
  try:
    return models.family_for(model, batch).mask
  except errors.ConfigError:
    logging.warning(
      'A batch of %s does not say which rows are padding: all of them count. '
      "Put `weights` of the rows into it, 0 for padding, or give `mask=lambda "
      'path, batch: ...`.', ', '.join(batch),
    )  # fmt: skip
    return lambda path, batch: None


def default_apply(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
) -> Mapping[str, typing.Tree]:
  """One forward pass in evaluation mode, keeping what was left behind."""
  family = models.family_for(model, batch)
  _, left = family.call(family.variables(params), batch, mutable=[COLLECTION])
  return left


def inputs_of(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  reduce: Callable[[typing.Path, typing.Array], Any],
  *,
  wanted: Callable[[typing.Path], bool],
  convolutions: bool = True,
  kernels: Mapping[type, linear.Describe] | None = None,
  apply: Callable[..., Any] | None = None,
  met: Met | None = None,
) -> dict[typing.Path, Any]:
  """Runs a model and reduces what each of its linear maps is given.

  Args:
    model: a model's family, or any linen module.
    params: its parameters.
    batch: as the model is called with, see `models.family_for`.
    reduce: `(path, inputs <float>[..., in]) -> tree of arrays`, called while
      tracing; several calls of one layer are added up.
    wanted: which parameters to watch.
    convolutions: also those of convolutions, except classes in `kernels`, which
      are always watched.
    kernels: further modules with linear maps: `{class: describe}`.
    apply: `(module, params, batch) -> variables left behind`, for modules that
      are called otherwise.
    met: filled with what the trace meets.

  Returns:
    `{path: what reduce gave}`; lifted layers have their stack in front.
  """
  kernels = kernels or {}
  met = Met() if met is None else met

  def interceptor(call, arguments, named, context):
    layer = context.module
    if isinstance(layer, linear.REWRITING):
      met.rewritten['/'.join(layer.layer_instance.path)] = type(layer).__name__
    convolves = isinstance(layer, linear.CONVOLUTIONS)
    if convolves:
      met.convolutions.add('/'.join((*layer.path, 'kernel')))
    if convolutions or not convolves or isinstance(layer, tuple(kernels)):
      for name, inputs in linear.describe(context, arguments, named, kernels):
        path = '/'.join((*layer.path, name))
        if wanted(path):
          met.maps.add(path)
          inputs = inputs() if callable(inputs) else inputs
          if isinstance(inputs, linear.Stacked):
            value = jax.vmap(functools.partial(reduce, path))(inputs.rows)
          else:
            value = reduce(path, inputs)
          _leave(layer, name, value)
    return call(*arguments, **named)

  with nn.intercept_methods(interceptor):
    if apply is None:
      left = default_apply(model, params, batch)
    else:
      left = apply(getattr(model, 'module', model), params, batch)
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
    elif isinstance(value, Mapping):
      yield from _walk(value, (*path, name))


def wanted_kernels(
  specs: typing.SpecTree,
  include: Sequence[str] | None,
  exclude: Sequence[str],
  *,
  tied_head: bool = False,
) -> list[typing.Path]:
  """The parameters that are asked for, as far as their names tell.

  Args:
    specs: of the model.
    include: full-match regular expressions; by default every `kernel`. Which of
      them belong to convolutions is known when the model runs, not from their
      shapes.
    exclude: full-match regular expressions to leave out.
    tied_head: also embeddings that are the output head as well.

  Raises:
    UserError: an expression that is none, or matches nothing.
  """
  for pattern in (*(include or ()), *exclude):
    matches = tree_lib.expression(pattern, 'pattern').fullmatch
    if not any(map(matches, specs)):
      raise errors.ConfigError(
        f'{pattern!r} matches no parameter. They begin with:\n'
        f'{errors.listed(list(specs), 5)}'
      )

  def asked(path):
    if any(re.fullmatch(pattern, path) for pattern in exclude):
      return False
    if include is not None:
      return any(re.fullmatch(pattern, path) for pattern in include)
    name = path.rsplit('/', 1)[-1]
    if name == 'embedding':
      return tied_head
    return name == 'kernel'

  return [
    path for path, spec in specs.items() if len(spec.shape) >= 2 and asked(path)
  ]


def check_seen(
  asked: Sequence[typing.Path],
  seen: Collection[typing.Path],
  met: Met,
  specs: typing.SpecTree,
) -> None:
  """Compares what was asked for with what was seen.

  Args:
    asked: without convolutions that are not wanted.
    seen: what came out of the model's run.
    met: what its trace met.
    specs: of the model.

  Raises:
    UserError: nothing was asked for, or a kernel was not seen; with what to do
      about each.
  """
  if not asked:
    hint = ' Convolutions take `conv=True`.' if met.convolutions else ''
    raise errors.StructureError(
      'No parameter is the kernel of a linear map, or all are excluded: there '
      f'is nothing to collect.{hint} They begin with:\n'
      f'{errors.listed(list(specs), 5)}'
    )
  missing = [path for path in asked if path not in seen]
  rewritten = [p for p in missing if p.rpartition('/')[0] in met.rewritten]
  hidden = [p for p in missing if p in met.maps and p not in rewritten]
  unknown = [p for p in missing if p not in {*rewritten, *hidden}]
  parts = []
  if rewritten:
    kinds = {met.rewritten[p.rpartition('/')[0]] for p in rewritten}
    parts.append(
      f'nn.{" and nn.".join(sorted(kinds))} computes these kernels from what is '
      'stored, so that no statistics of the stored ones exist; leave them out '
      f'with {_leave_out(rewritten)}:\n{errors.listed(rewritten)}'
    )
  if hidden:
    parts.append(
      f'A lifted layer hides these; it must lift the collection {COLLECTION!r} '
      f"too, `nn.scan(..., variable_axes={{'params': 0, {COLLECTION!r}: 0}})`, "
      f'and `apply`, where you give it, must return that collection:\n'
      f'{errors.listed(hidden)}'
    )
  if unknown:
    parts.append(
      'No nn.Dense, nn.DenseGeneral, nn.Conv or nn.Embed works with these. Tell '
      'what their layers are given with `kernels={MyLayer: describe}`, or leave '
      f'them out with {_leave_out(unknown)}:\n{errors.listed(unknown)}'
    )
  if parts:
    raise errors.StructureError(
      f'{len(missing)} of {len(asked)} kernels were never seen at work.\n'
      + '\n'.join(parts)
    )


def _leave_out(paths):
  """The option that leaves out these paths, to be copied."""
  shown = [re.escape(path) for path in paths[:3]]
  more = ', ...' if len(paths) > 3 else ''
  return f'`exclude=[{", ".join(map(repr, shown))}{more}]`'


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
      raise errors.StructureError(errors.near(mask, [NONZERO], 'mask'))
    return jnp.any(inputs != 0, axis=-1).astype(jnp.float32)
  mask = jnp.asarray(mask)
  if inputs.shape[: mask.ndim] != mask.shape:
    raise errors.StructureError(
      f'The inputs of {path} are {list(inputs.shape)}, but its mask is '
      f'{list(mask.shape)}: give the mask of the positions that this layer '
      'reads, with `mask=lambda path, batch: ...`.'
    )
  rest = (1,) * (inputs.ndim - 1 - mask.ndim)
  return jnp.broadcast_to(
    mask.reshape(*mask.shape, *rest), inputs.shape[:-1]
  ).astype(jnp.float32)
