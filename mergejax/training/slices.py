# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers that look at whole arrays, where an array is a stack of several.

Adafactor scales, clips and factors by the norms of an array. Layers that are
stacked in one array (`nn.scan`), experts or branches must keep norms of their
own.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing


def per_slice(
  optimizer: optax.GradientTransformation,
  axes: axes_lib.Rules,
  known: axes_lib.Rules = (),
  *,
  one_model: bool = False,
) -> optax.GradientTransformation:
  """An optimizer that takes each slice of a stacked array for an array.

  Args:
    optimizer: treats every leaf by itself.
    axes: `[(path, logical axes)]`; see `axes.with_axes` and `axes.STACKS`.
    known: likewise, what the model says of itself; `axes` go before.
    one_model: the parameters must be those of one model: a `branch` axis, of
      several models, is refused.

  Returns:
    The transformation. Where nothing is stacked its state is that of
    `optimizer`; otherwise `{'whole': state of the other leaves, 'stacked':
    {path: state, with the stacked axes first}}`.
  """

  def init(params):
    leaves = tree.flatten(params)
    stacks = _stacks(params, (known, axes), one_model)
    if not stacks:
      return optimizer.init(params)
    return {
      'whole': optimizer.init(_rest(leaves, stacks)),
      'stacked': {
        path: _mapped(optimizer.init, stack)(_first(leaves[path], stack))
        for path, stack in stacks.items()
      },
    }

  def update(updates, state, params):
    stacks = _stacks(params, (known, axes), one_model)
    if not stacks:
      return optimizer.update(updates, state, params)
    leaves, grads = tree.flatten(params), tree.flatten(updates)
    result, whole = optimizer.update(
      _rest(grads, stacks), state['whole'], _rest(leaves, stacks)
    )
    stacked = {}
    for path, stack in stacks.items():
      found, stacked[path] = _mapped(optimizer.update, stack)(
        _first(grads[path], stack),
        state['stacked'][path],
        _first(leaves[path], stack),
      )
      result[path] = jnp.moveaxis(found, range(len(stack)), stack)
    result = jax.tree.unflatten(
      jax.tree.structure(updates), [result[path] for path in grads]
    )
    return result, {'whole': whole, 'stacked': stacked}

  return optax.GradientTransformation(init, update)


def _stacks(
  params: typing.Tree, given: Sequence[axes_lib.Rules], one_model: bool
) -> dict[typing.Path, tuple[int, ...]]:
  """Positions of the stacked axes of every leaf that has some."""
  specs = tree.specs(params)
  for axes in given:
    specs = axes_lib.with_axes(specs, axes)
  for path, spec in specs.items():
    if spec.axes is None and len(spec.shape) > 2:
      _check_known(path, spec)
    if one_model and 'branch' in (spec.axes or ()):
      raise errors.ConfigError(
        f'{path} stacks several models on the axis `branch`, but '
        'max_gradient_norm clips the gradient of one. Train them with '
        '`experts.branch.BranchTrainer`, which maps the step of one model '
        'over them, or leave max_gradient_norm out.'
      )
  found = {path: axes_lib.stacked(spec) for path, spec in specs.items()}
  return {path: stack for path, stack in found.items() if stack}


def _check_known(path, spec):
  try:
    axes_lib.view(path, spec)
  except errors.UserError as error:
    raise errors.ConfigError(
      f'Whether an axis of {path} {list(spec.shape)} stacks layers or experts '
      'is not known, and Adafactor must know: it scales and clips each of them '
      'by itself. Name the axes, one name an axis: '
      f"adafactor(..., axes=[({path!r}, ('layers', 'embed', 'mlp'))]); stacked "
      f'ones are called {", ".join(axes_lib.STACKS)}.'
    ) from error


def _rest(
  leaves: Mapping[typing.Path, typing.Array],
  stacks: Mapping[typing.Path, tuple[int, ...]],
) -> dict[typing.Path, typing.Array]:
  return {path: leaf for path, leaf in leaves.items() if path not in stacks}


def _first(leaf, stack):
  """The leaf with its stacked axes in front."""
  return jnp.moveaxis(leaf, stack, range(len(stack)))


def _mapped(fn, stack):
  """`fn` of one slice, over the stacked axes in front of its arguments."""
  for _ in stack:
    fn = jax.vmap(fn)
  return fn
