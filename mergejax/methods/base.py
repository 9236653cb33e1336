# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge method is: a pure triple whose state adds, after first passes.

Like an optax transformation: `init` makes zeros from shapes, `update` takes
one model in, `finish` gives the result. Models stream through one at a time,
and two states of an additive method can be summed, so the same few lines serve
checkpoints read from disk, averaging inside a train step, and experts on a
mesh axis.

Many methods need a few numbers of a whole leaf first: norms, a K x K matrix of
inner products, the k-th largest magnitude. They declare a `FirstPass`. Once the
numbers are known everything is element-wise again, so a leaf of any size can
be merged in pieces, and a sharded one where it lies.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import statistic_specs
from mergejax.core import typing
from mergejax.methods import protocols

State = protocols.State
Note = protocols.Note


class LeafContext(NamedTuple):
  """What a method knows of one leaf of one model, beside the numbers in it.

  Attributes:
    model: which of the models this is, from 0; may be traced.
    note: what the first passes found, `{name: scalars}`.
    key: <uint32>[2], from seed, path and model alone; see `masks`.
    stats: statistics of this leaf that the model brings, `{name: array}`.
    place: shape of the piece at hand, and the flat position of its first
      element in the whole leaf.
  """

  model: Any = 0
  note: Note = {}
  key: typing.Array | None = None
  stats: Mapping[str, typing.Array] | None = None
  place: tuple[tuple[int, ...], Any] | None = None

  @property
  def index(self) -> typing.Array:
    """<uint32>[...], flat position of every element in the whole leaf."""
    if self.place is None:
      raise ValueError('Only a piece of a leaf has positions.')
    shape, offset = self.place
    flat = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return flat + jnp.asarray(offset, jnp.uint32)


class FirstPass(NamedTuple):
  """A first pass over a leaf of all models that leaves a few numbers.

  Attributes:
    measure: `(leaves, base, contexts, weights) -> found`. Without `ranks`: a
      pytree of small arrays, already reduced, that combine over pieces of a
      leaf. With `ranks`: a list of scores <float32>[...], one per element.
    conclude: `(found, contexts, weights) -> [note per model]`; the notes
      are added to the contexts that later passes and `update` get.
    ranks: `(size, contexts) -> [(rank, ...) per score]`. Asks for exact order
      statistics of each score: `found` then holds for each score one
      `Cut(threshold, index)` a rank, see `numerics.Cut`.
    combine: how pieces combine, 'sum' or 'max'.
    scope: 'leaf', or 'tree' for numbers of the whole model.
  """

  measure: protocols.MeasureFn
  conclude: protocols.ConcludeFn
  ranks: protocols.RanksFn | None = None
  combine: str = 'sum'
  scope: str = 'leaf'


class Merge(NamedTuple):
  """A merge method.

  Attributes:
    init: `(specs) -> state`, zeros.
    update: `(state, params, *, base=None, weight=1.0, contexts=None) ->
      state`; params and base are `{path: array}` of floating leaves, already
      in their accumulation dtype; contexts is `{path: LeafContext}`.
    finish: `(state, *, base=None) -> {path: array}`, not yet cast.
    first_passes: what must be measured first, in order.
    needs: statistics that every model brings, such as `(FISHER,)`; the name
      alone means one of the package, or one that lies like its leaf.
    base: 'required' for methods on differences from a common ancestor,
      'optional' for those that then work on differences, 'ignored'.
    counts: smallest and largest number of models, None for no limit.
    default_weights: weights of the models in order when none are given.
    view: how a leaf is laid before the method: 'element' as it lies (any
      piece of it will do), 'unit' as `[units, inputs]` with one row for each
      output unit, 'input' as `[inputs, units]`, 'matrix' as `[inputs,
      outputs]` with nothing cut off; see `axes.View`.
    separable: no leaf depends on another, so the tree may be split.
    additive: states add.
    numbered: numbers or counts elements in 32 bits, as random masks do: must be
      said of a method that reads `LeafContext.key` or `index`.
  """

  init: protocols.InitFn
  update: protocols.UpdateFn
  finish: protocols.FinishFn
  first_passes: tuple[FirstPass, ...] = ()
  needs: tuple[statistic_specs.StatisticSpec | str, ...] = ()
  base: str = 'ignored'
  counts: tuple[int, int | None] = (1, None)
  default_weights: tuple[float, ...] | None = None
  view: str = 'element'
  separable: bool = True
  additive: bool = True
  numbered: bool = False

  @property
  def numbers_elements(self) -> bool:
    """True if a leaf must have fewer than 2**32 elements: masks, ranks."""
    ranks = any(
      first_pass.ranks is not None for first_pass in self.first_passes
    )
    return self.numbered or ranks

  @property
  def statistics(self) -> tuple[statistic_specs.StatisticSpec, ...]:
    """The specs of the statistics that it needs."""
    return tuple(
      need
      if isinstance(need, statistic_specs.StatisticSpec)
      else statistic_specs.named(need) or statistic_specs.StatisticSpec(need)
      for need in self.needs
    )

  @property
  def of_whole_leaves(self) -> bool:
    """True if a stack of leaves has other numbers than its slices."""
    of_leaves = any(
      first_pass.scope == 'leaf' for first_pass in self.first_passes
    )
    return of_leaves or self.view != 'element'

  @property
  def has_tree_passes(self) -> bool:
    """True if it measures all leaves of a model together."""
    return any(first_pass.scope == 'tree' for first_pass in self.first_passes)

  @property
  def of_slices(self) -> bool:
    """True if a stack is merged slice by slice, as leaves of their own.

    Passes over the whole model alone see the same numbers either way, and so
    does what is element-wise; random masks have a key for each slice, and
    statistics that do not lie like their leaf one array.
    """
    masks = self.numbered and not self.first_passes
    laid = all(need.is_leaf for need in self.statistics)
    return self.of_whole_leaves or masks or not laid


def leafwise(
  init: Callable[[typing.Array], State],
  update: protocols.LeafUpdateFn,
  finish: protocols.LeafFinishFn,
  **fields: Any,
) -> Merge:
  """A `Merge` from functions of one leaf.

  Args:
    init: `(zeros) -> state` of a leaf; zeros have its shape and accumulation
      dtype.
    update: `(state, leaf, base, weight, context) -> state`; base is None where
      there is none, weight a scalar of the leaf's dtype.
    finish: `(state, base) -> leaf`.
    **fields: the other fields of `Merge`.

  Returns:
    A method over trees.
  """

  def init_tree(specs):
    return {
      path: init(jnp.zeros(spec.shape, numerics.accumulation_dtype(spec.dtype)))
      for path, spec in specs.items()
    }

  def update_tree(state, params, *, base=None, weight=1.0, contexts=None):
    return {
      path: update(
        state[path],
        leaf,
        None if base is None else base[path],
        jnp.asarray(weight, leaf.dtype),
        LeafContext() if contexts is None else contexts[path],
      )
      for path, leaf in params.items()
    }

  def finish_tree(state, *, base=None):
    return {
      path: finish(leaf, None if base is None else base[path])
      for path, leaf in state.items()
    }

  return Merge(init_tree, update_tree, finish_tree, **fields)


def gathered(combine: protocols.CombineFn, **fields: Any) -> Merge:
  """A method that must see the K copies of a leaf at once.

  It holds K times the leaf (or the piece of it), which the plan counts; its
  states do not add.

  Args:
    combine: `(leaves, base, weights, contexts) -> leaf`.
    **fields: fields of `Merge`.

  Returns:
    A method over trees.
  """
  return leafwise(
    lambda zeros: (),
    lambda state, leaf, base, weight, context: (
      *state,
      (leaf, weight, context),
    ),
    lambda state, base: combine(
      [leaf for leaf, _, _ in state],
      base,
      [weight for _, weight, _ in state],
      [context for _, _, context in state],
    ),
    **{'additive': False, **fields},
  )


def of_one_model(combine: protocols.SingleFn, **fields: Any) -> Merge:
  """A method over exactly one model, whose weight plays no part.

  Args:
    combine: `(leaf, base, context) -> leaf`; base is None where there is none.
    **fields: fields of `Merge`.

  Returns:
    A method over trees.
  """
  return leafwise(
    lambda zeros: zeros,
    lambda state, leaf, base, weight, context: combine(leaf, base, context),
    lambda state, base: state,
    counts=(1, 1),
    default_weights=(1.0,),
    **fields,
  )


def of_model(option: Any, context: LeafContext, dtype: Any) -> typing.Array:
  """The value that an option has for a model: one for all, or one each."""
  values = jnp.asarray(option, dtype)
  return values if values.ndim == 0 else values[context.model]


def check_option(
  name: str,
  option: Any,
  test: Callable[[float], bool],
  wanted: str,
) -> None:
  """Checks a number, or every number of a list of one per model.

  Values that JAX traces cannot be looked at and pass.

  Raises:
    UserError: naming the option, what it may be, and what came.
  """
  values = option if isinstance(option, (list, tuple, np.ndarray)) else [option]
  for value in values:
    if numerics.is_traced(value):
      continue
    plain = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
    if isinstance(value, bool) or not plain or not test(float(value)):
      raise errors.ConfigError(f'{name} must be {wanted}, not {value!r}.')


def check_finite(name: str, option: Any) -> None:
  """`check_option` for numbers that may have any finite value."""
  check_option(name, option, math.isfinite, 'a finite number')


def check_not_negative(name: str, option: Any) -> None:
  """`check_option` for numbers that may not be below 0."""
  check_option(name, option, lambda value: value >= 0, '0 or above')


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Checks an option that is one of a few words.

  Raises:
    UserError: with the nearest of them.
  """
  if value not in choices:
    raise errors.ConfigError(
      errors.near(str(value), choices, f'value of {name},')
    )


def check_weights(
  method: Merge, weights: Sequence[Any] | typing.Array | None, count: int
) -> list[Any]:
  """The coefficient of every model, checked as far as it is known.

  Raises:
    UserError: a number of models or weights that does not fit, or a
      coefficient that is not finite.
  """
  fixed = method.default_weights
  least, most = method.counts
  if count < least or (most is not None and count > most):
    wanted = (
      f'exactly {least}'
      if least == most
      else f'at least {least}'
      if most is None
      else f'{least} to {most}'
    )
    besides = '' if method.base == 'ignored' else ' besides the base'
    raise errors.ConfigError(
      f'This method takes {wanted} model(s){besides}, {count} given.'
    )
  if weights is None:
    weights = [1.0] * count if fixed is None else fixed
  if isinstance(weights, jax.Array):
    weights = [weights[i] for i in range(weights.shape[0])]
  weights = list(weights)
  if len(weights) != count:
    raise errors.ConfigError(
      f'{len(weights)} weight(s) for {count} model(s): give one for each.'
    )
  for weight in weights:
    if not numerics.is_traced(weight) and not np.isfinite(weight):
      raise errors.ConfigError(
        f'Weights must be finite numbers, not {weights}.'
      )
  return weights
