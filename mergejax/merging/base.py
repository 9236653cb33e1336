# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A merge method is a pure triple whose state adds.

Like an optax transformation: `init` makes zeros from shapes, `update` takes
one model in, `finish` gives the result. Models stream through one at a time,
and two states of an additive method can be summed, so the same few lines serve
checkpoints read from disk, averaging inside a train step, and experts on a
mesh axis.
"""

from collections.abc import Callable, Sequence
import logging
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import errors
from mergejax import numerics
from mergejax import tree as tree_lib
from mergejax import typing

State = Any


class Merge(NamedTuple):
  """A merge method.

  Attributes:
    init: `(specs) -> state`, zeros.
    update: `(state, params, *, base=None, weight=1.0, key=None) -> state`;
      params and base are `{path: array}` of floating leaves, already in their
      accumulation dtype.
    finish: `(state, *, base=None) -> {path: array}`, not yet cast.
    needs_base: the method works on differences from a base model.
    default_weights: weights of the models in order when none are given; fixes
      how many models there must be. None: any number, all weights 1.
    separable: leaves do not look at each other, so the tree may be split.
    additive: states add.
  """

  init: Callable[[typing.SpecTree], State]
  update: Callable[..., State]
  finish: Callable[..., dict[typing.Path, typing.Array]]
  needs_base: bool = False
  default_weights: tuple[float, ...] | None = None
  separable: bool = True
  additive: bool = True


# Opens a path as a store; given by the caller, because methods do not know how
# weights are stored.
Opener = Callable[[os.PathLike | str], Any]


class _Model:
  """One input of a merge, a tree or a store, seen leaf by leaf."""

  def __init__(self, source, name: str, opener: Opener | None):
    if isinstance(source, (str, os.PathLike)):
      name, source = str(source), opener(source)
    self.name = name
    self._store = source if hasattr(source, 'read') else None
    if self._store is None:
      self._leaves = tree_lib.flatten(source)
      self.specs = tree_lib.specs(self._leaves)
      self.structure = jax.tree.structure(source)
    else:
      self.specs = source.specs()
      self.structure = None

  def leaf(self, path):
    if self._store is None:
      return self._leaves[path]
    return tree_lib.flatten(self._store.read([path]))[path]


def merge(
  models: Sequence[Any],
  method: Merge,
  *,
  base: Any = None,
  weights: Sequence[Any] | None = None,
  dtype: Any = None,
  seed: int = 0,
  opener: Opener | None = None,
) -> typing.Tree:
  """Merges models into one tree.

  A separable method runs leaf by leaf: of stores, only one leaf of each model
  is in memory at a time, beside the result. On sharded trees every leaf keeps
  its sharding. Works under `jit`; weights may be traced, and gradients reach
  them.

  Args:
    models: trees, stores, or (with `opener`) paths, all of one structure.
    method: what to do.
    base: the common ancestor, for methods that need one; a tree, store or path.
    weights: one coefficient a model; all 1 by default (or as the method says).
    dtype: dtype of floating leaves of the result; by default as in the base,
      else as in the first model.
    seed: seeds random methods; keys are folded with path and model.
    opener: opens paths.

  Returns:
    A tree of the structure of the first model. Floating leaves are accumulated
    in float32 (float64 if stored so) and cast once. Other leaves (step
    counters, ids) are copied from the base or the first model.

  Raises:
    UserError: no model, no base where one is needed, differing trees (listed),
      or weights that do not fit.
  """
  if not models:
    raise errors.UserError('A merge needs at least one model; none was given.')
  inputs = [_Model(m, f'model {i}', opener) for i, m in enumerate(models)]
  base_input = None if base is None else _Model(base, 'the base', opener)
  weights = check_weights(method, weights, len(inputs))
  if method.needs_base and base_input is None:
    raise errors.UserError(
      'This method works on differences from a common ancestor: give it with '
      '`base=` (in a recipe: `base_model:`).'
    )
  reference = base_input or inputs[0]
  for one in inputs:
    tree_lib.check_same(
      reference.specs,
      one.specs,
      expected_name=reference.name,
      given_name=one.name,
    )
  averaged = [
    path
    for path, spec in reference.specs.items()
    if numerics.is_averaged(spec.dtype)
  ]
  key = jax.random.key(seed)
  result = {}
  for paths in [[p] for p in averaged] if method.separable else [averaged]:
    result.update(
      _merge_leaves(paths, inputs, base_input, method, weights, key)
    )
  for path, leaf in result.items():
    wanted = np.dtype(dtype or reference.specs[path].dtype)
    stored = jax.dtypes.canonicalize_dtype(wanted)
    if stored != wanted:
      logging.warning(
          '%s is %s but JAX is limited to %s; set JAX_ENABLE_X64=1 to keep it.',
          path, wanted, stored,
      )  # fmt: skip
    result[path] = leaf.astype(stored)
  for path in reference.specs:
    if path not in result:
      result[path] = _copied(path, reference, inputs)
  if inputs[0].structure is not None:
    return jax.tree.unflatten(
      inputs[0].structure, [result[path] for path in inputs[0].specs]
    )
  return tree_lib.unflatten({path: result[path] for path in reference.specs})


def _merge_leaves(paths, inputs, base, method, weights, key):
  widened = lambda model: {p: numerics.widen(model.leaf(p)) for p in paths}
  base_leaves = widened(base) if base is not None else None
  state = None
  for i, (model, weight) in enumerate(zip(inputs, weights)):
    leaves = widened(model)
    if state is None:
      state = method.init(tree_lib.specs(leaves))
    state = method.update(
      state,
      leaves,
      base=base_leaves,
      weight=weight,
      key=jax.random.fold_in(key, i),
    )
  return method.finish(state, base=base_leaves)


def _copied(path, reference, inputs):
  leaf = reference.leaf(path)
  for model in inputs:
    other = model.leaf(path)
    if isinstance(leaf, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
      continue
    if not np.array_equal(np.asarray(leaf), np.asarray(other)):
      logging.warning(
          '%s is not a floating array and is not averaged; %s and %s differ '
          'in it, the former is kept.', path, reference.name, model.name,
      )  # fmt: skip
      break
  return leaf


def check_weights(
  method: Merge, weights: Sequence[Any] | None, count: int
) -> list[Any]:
  """The coefficient of every model, checked as far as it is known.

  Raises:
    UserError: a count that does not fit, or a coefficient that is not finite.
  """
  fixed = method.default_weights
  if fixed is not None and count != len(fixed):
    raise errors.UserError(
      f'This method takes exactly {len(fixed)} model(s), {count} given.'
    )
  if weights is None:
    weights = [1.0] * count if fixed is None else fixed
  if isinstance(weights, jax.Array):
    weights = [weights[i] for i in range(weights.shape[0])]
  weights = list(weights)
  if len(weights) != count:
    raise errors.UserError(
      f'{len(weights)} weight(s) for {count} model(s): give one for each.'
    )
  for weight in weights:
    if not isinstance(weight, jax.core.Tracer) and not np.isfinite(weight):
      raise errors.UserError(f'Weights must be finite numbers, not {weights}.')
  return weights


def zeros(specs: typing.SpecTree) -> dict[typing.Path, typing.Array]:
  """Zeros in the accumulation dtype of every leaf."""
  return {
    path: jnp.zeros(spec.shape, numerics.accumulation_dtype(spec.dtype))
    for path, spec in specs.items()
  }


def add_states(first: State, second: State) -> State:
  """Sum of two states of an additive method: one longer stream of models."""
  return jax.tree.map(jnp.add, first, second)
