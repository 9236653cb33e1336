# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers that look at whole arrays, where an array is a stack of several.

Adafactor scales, clips and factors by the norms of an array. Layers that are
stacked in one array (`nn.scan`), experts or branches must keep norms of their
own.
"""

from collections.abc import Callable, Mapping

import jax
import optax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import factors as factors_lib

# Where the state of stacked parameters lies, their stacked axes in front.
STACKED = 'stacked'
# And that of all others, where there are some.
WHOLE = 'whole'


def per_slice(
  make: Callable[[bool | None], optax.GradientTransformation],
  axes: axes_lib.Rules,
  known: axes_lib.Rules = (),
  *,
  factors: factors_lib.Factors = factors_lib.Factors(),
  one_model: bool = False,
) -> optax.GradientTransformation:
  """An optimizer that takes each slice of a stacked array for an array.

  Args:
    make: `(factored) -> optimizer` that treats every leaf by itself; `None`
      leaves it to sizes whether a leaf is factored.
    axes: `[(path, logical axes)]`; see `axes.with_axes` and `axes.STACKS`.
    known: likewise, what the model says of itself; `axes` go before.
    factors: rules of what is factored; a slice of more than two axes goes to
      the optimizer as the matrix `[rows, columns]`.
    one_model: the parameters must be those of one model: a `branch` axis, of
      several models, is refused.

  Returns:
    The transformation. Where nothing is stacked, or has a rule, its state is
    that of `make(None)`; otherwise `{'whole': state of the other leaves,
    'stacked': {path: state, with the stacked axes first}}`.
  """
  optimizers = {factored: make(factored) for factored in (None, True, False)}
  optimizer = optimizers[None]

  def init(params):
    leaves = tree.flatten(params)
    special = _special(params, (known, axes), factors, one_model)
    if not special:
      return optimizer.init(params)
    return {
      WHOLE: optimizer.init(_rest(leaves, special)),
      STACKED: {
        path: _mapped(optimizers[layout.factored].init, layout.stack)(
          factors_lib.lay(leaves[path], layout)
        )
        for path, layout in special.items()
      },
    }

  def update(updates, state, params):
    special = _special(params, (known, axes), factors, one_model)
    if not special:
      return optimizer.update(updates, state, params)
    leaves, grads = tree.flatten(params), tree.flatten(updates)
    result, whole = optimizer.update(
      _rest(grads, special), state[WHOLE], _rest(leaves, special)
    )
    stacked = {}
    for path, layout in special.items():
      move = _mapped(optimizers[layout.factored].update, layout.stack)
      found, stacked[path] = move(
        factors_lib.lay(grads[path], layout),
        state[STACKED][path],
        factors_lib.lay(leaves[path], layout),
      )
      result[path] = factors_lib.unlay(found, leaves[path].shape, layout)
    result = jax.tree.unflatten(
      jax.tree.structure(updates), [result[path] for path in grads]
    )
    return result, {WHOLE: whole, STACKED: stacked}

  return optax.GradientTransformation(init, update)


def _special(params, given, factors, one_model):
  """Layouts of the leaves that are not taken as they lie."""
  specs = tree.specs(params)
  for axes in given:
    specs = axes_lib.with_axes(specs, axes)
  for path, spec in specs.items():
    if spec.axes is None and len(spec.shape) > 2:
      if not factors_lib.parts(path, spec, factors):
        _check_known(path, spec)
    if one_model and 'branch' in (spec.axes or ()):
      raise errors.ConfigError(
        f'{path} stacks several models on the axis `branch`, but '
        'max_gradient_norm clips the gradient of one. Train them with '
        '`experts.branch.BranchTrainer`, which maps the step of one model '
        'over them, or leave max_gradient_norm out.'
      )
  return factors_lib.layouts(specs, factors)


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
  special: Mapping[typing.Path, factors_lib.Layout],
) -> dict[typing.Path, typing.Array]:
  return {path: leaf for path, leaf in leaves.items() if path not in special}


def _mapped(fn, stack):
  """`fn` of one slice, over the stacked axes in front of its arguments."""
  for _ in stack:
    fn = jax.vmap(fn)
  return fn
