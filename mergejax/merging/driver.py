# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a merge method over trees and stores: looks first, then the triple."""

from collections.abc import Mapping, Sequence
import functools
import logging
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax import axes as axes_lib
from mergejax import errors
from mergejax import numerics
from mergejax import tree as tree_lib
from mergejax import typing
from mergejax.merging import base as base_lib
from mergejax.merging import given
from mergejax.merging import masks

# What a rule says for leaves that are not merged.
COPY = 'copy'


class Part(NamedTuple):
  """One leaf, a slice of a stack or a piece, of all models, laid for a method.

  Attributes:
    leaves: one array a model, in the accumulation dtype.
    base: the base's, or None.
    marks: one a model, without `place`.
    offset: flat position of the first element in the whole leaf.
  """

  leaves: list[typing.Array]
  base: typing.Array | None
  marks: list[base_lib.Mark]
  offset: Any = 0

  def placed(self) -> list[base_lib.Mark]:
    """The marks, knowing where their elements are."""
    place = (self.leaves[0].shape, self.offset)
    return [mark._replace(place=place) for mark in self.marks]


class Source:
  """One input of a merge, a tree or a store, seen leaf by leaf."""

  def __init__(self, source, name: str):
    self._store = source if hasattr(source, 'read') else None
    self.name = name if self._store is None else source.name
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
  method: base_lib.Merge,
  *,
  base: Any = None,
  weights: Sequence[Any] | None = None,
  stats: Sequence[Mapping[typing.Path, Mapping[str, typing.Array]]]
  | None = None,
  axes: axes_lib.Rules = (),
  rules: Sequence[tuple[str, base_lib.Merge | str]] = (),
  dtype: Any = None,
  seed: int = 0,
) -> typing.Tree:
  """Merges models into one tree.

  A separable method runs leaf by leaf: of stores, only one leaf of each model
  is in memory at a time, beside the result. On sharded trees every leaf keeps
  its sharding; numbers of a whole leaf are sums over devices, nothing is
  gathered. Works under `jit`; weights may be traced, and gradients reach them.

  Args:
    models: trees or stores, all of one structure, except in leaves that a rule
      copies.
    method: what to do.
    base: the common ancestor, for methods that need one; a tree or store.
    weights: one coefficient a model; all 1 by default (or as the method says).
    stats: for each model `{path: {name: array}}`, for methods that need
      statistics.
    axes: `(regular expression, logical axes)` of leaves whose layout their
      path does not tell, or that are stacks of layers.
    rules: `(regular expression, method)` for leaves that are to be merged
      otherwise, or `'copy'` to take them from the base or the first model; the
      first full match of a path decides.
    dtype: dtype of floating leaves of the result; by default as in the base,
      else as in the first model.
    seed: seeds random methods; keys are made of seed, path and model.

  Returns:
    A tree of the structure of the first model. Floating leaves are accumulated
    in float32 (float64 if stored so) and cast once. Other leaves (step
    counters, ids) are copied from the base or the first model.

  Raises:
    UserError: no model, no base where one is needed, differing trees (listed),
      weights or statistics that do not fit, a result that is not finite.
  """
  if not models:
    raise errors.UserError('A merge needs at least one model; none was given.')
  inputs = [Source(m, f'model {i}') for i, m in enumerate(models)]
  base_input = None if base is None else Source(base, 'the base')
  _check_call(method, weights, len(inputs), base_input)
  reference = base_input or inputs[0]
  _check_trees(rules, reference, inputs)
  specs = axes_lib.with_axes(reference.specs, axes)
  averaged = [p for p, s in specs.items() if numerics.is_averaged(s.dtype)]
  result = {}
  for own, paths in _by_rule(rules, method, averaged):
    if own == COPY:
      result |= {path: reference.leaf(path) for path in paths}
      continue
    merged = _merge_leaves(
        own, paths, specs, inputs, base_input, weights, stats, seed,
    )  # fmt: skip
    for path, leaf in merged:
      result[path] = _stored(path, leaf, dtype or specs[path].dtype)
      layout = getattr(inputs[0].leaf(path), 'sharding', None)
      if isinstance(layout, jax.sharding.NamedSharding):
        if not isinstance(leaf, jax.core.Tracer):
          result[path] = jax.device_put(result[path], layout)
  for path in reference.specs:
    if path not in result:
      result[path] = _copied(path, reference, inputs)
  alike = inputs[0].specs.keys() == reference.specs.keys()
  if inputs[0].structure is not None and alike:
    return jax.tree.unflatten(
      inputs[0].structure, [result[path] for path in inputs[0].specs]
    )
  return tree_lib.unflatten({path: result[path] for path in reference.specs})


def _check_trees(rules, reference, inputs):
  """Raises if models differ elsewhere than in leaves that a rule copies."""

  def compared(specs):
    rule_of = lambda path: next(
      (own for pattern, own in rules if re.fullmatch(pattern, path)), None
    )
    return {p: spec for p, spec in specs.items() if rule_of(p) != COPY}

  for one in inputs:
    try:
      tree_lib.check_same(
        compared(reference.specs), compared(one.specs),
        expected_name=reference.name, given_name=one.name,
      )  # fmt: skip
    except errors.UserError as error:
      raise errors.UserError(
        f'{error.message} Leaves that need not agree, such as heads of other '
        f"sizes, can be those of {reference.name}: `rules=[('PATH', 'copy')]`."
      ) from error


def _check_call(method, weights, count, base_input):
  """The weights, if method, models and base fit together."""
  weights = base_lib.check_weights(method, weights, count)
  if method.base == 'required' and base_input is None:
    raise errors.UserError(
      'This method works on differences from a common ancestor: give it with '
      '`base=` (in a recipe: `base_model:`).'
    )
  return weights


def _by_rule(rules, method, paths):
  """`[(method, paths)]`: the leaves of each rule, then those of none."""
  for pattern, own in rules:
    if isinstance(own, str) and own != COPY:
      raise errors.UserError(
        f'The rule {pattern!r} should give a method, such as mj.linear(), or '
        f'{COPY!r}, not {own!r}.'
      )
  table = [*rules, ('.*', method)]
  chosen = {}
  for path in paths:
    chosen[path] = next(
      i for i, (pattern, _) in enumerate(table) if re.fullmatch(pattern, path)
    )
  unused = [table[i][0] for i in range(len(rules)) if i not in chosen.values()]
  if unused:
    raise errors.UserError(
      f'These rules are the first match of no leaf:\n{errors.listed(unused)}'
    )
  groups = [
    (own, [path for path in paths if chosen[path] == i])
    for i, (_, own) in enumerate(table)
  ]
  return [(own, some) for own, some in groups if some]


def _merge_leaves(
  method, paths, specs, inputs, base_input, weights, stats, seed
):
  """Yields `(path, merged leaf)` for leaves that one method merges."""
  weights = _check_call(method, weights, len(inputs), base_input)
  stats = given.check(method, stats, [one.name for one in inputs], paths, specs)
  if method.base == 'ignored':
    base_input = None
  run = Run(method, weights, specs, seed)

  def parts_of(path):
    leaves = [one.leaf(path) for one in inputs]
    origin = None if base_input is None else base_input.leaf(path)
    return run.parts(path, leaves, origin, [one.get(path) for one in stats])

  whole_tree = {p: parts_of(p) for p in paths if run.looks_at_trees}
  whole_tree = run.look_at_tree(whole_tree)
  for group in [[p] for p in paths] if method.separable else [paths]:
    parts = {p: whole_tree.get(p) or parts_of(p) for p in group}
    merged = run.finish({p: run.look_at_leaf(q) for p, q in parts.items()})
    yield from merged.items()


class Run:
  """One method over the leaves of one set of models."""

  def __init__(self, method, weights, specs, seed):
    self._method = method
    self._weights = list(weights)
    self._specs = specs
    self._seed = seed
    self.looks_at_trees = any(look.scope == 'tree' for look in method.looks)

  def parts(self, path, leaves, base, stats) -> list[Part]:
    """The slices of one leaf, laid for the method, with their marks."""
    spec, view = self._specs[path], self._view(path)
    method = self._method
    wide = [numerics.widen(leaf) for leaf in leaves]
    base = None if base is None else numerics.widen(base)
    result = []
    for at in np.ndindex(*(spec.shape[i] for i in view.stack)):
      cut = functools.partial(lay_slice, view=view, at=at, kind=method.view)
      name = path + ''.join(f'[{i}]' for i in at)
      first = cut(wide[0])
      marks = []
      for k, own in enumerate(stats):
        # A Fisher lies like its leaf; Gram matrices have the stack in front.
        own = own and {
          n: cut(s) if n == 'fisher' else s[at] for n, s in own.items()
        }
        key = masks.mask_key(self._seed, name, k)
        marks.append(base_lib.Mark(k, {}, key, stats=own))
      result.append(
        Part(
          [first, *(cut(leaf) for leaf in wide[1:])],
          None if base is None else cut(base),
          marks,
        )
      )
    return result

  def look_at_leaf(self, parts: list[Part]) -> list[Part]:
    """Runs the looks of scope 'leaf', each slice by itself."""
    for i, look in enumerate(self._method.looks):
      if look.scope == 'leaf':
        parts = [self._look(i, [part])[0] for part in parts]
    return parts

  def look_at_tree(self, parts: dict[str, list[Part]]) -> dict[str, list[Part]]:
    """Runs the looks of scope 'tree', over all leaves together."""
    flat = [part for several in parts.values() for part in several]
    for i, look in enumerate(self._method.looks):
      if look.scope == 'tree' and flat:
        flat = self._look(i, flat)
    flat = iter(flat)
    return {p: [next(flat) for _ in several] for p, several in parts.items()}

  def _look(self, i, parts):
    look = self._method.looks[i]
    if look.ranks is None:
      found = measure(look, parts, self._weights)
    else:
      size = sum(math.prod(part.leaves[0].shape) for part in parts)
      ranks = look.ranks(size, parts[0].marks)
      found = rank(look, parts, self._weights, ranks)
    result = []
    for part, own in zip(parts, found):
      notes = look.conclude(own, part.marks, self._weights_of(part))
      result.append(part._replace(marks=with_notes(part.marks, notes)))
    return result

  def _weights_of(self, part):
    return [jnp.asarray(w, part.leaves[0].dtype) for w in self._weights]

  def finish(self, parts: dict[str, list[Part]]) -> dict[str, typing.Array]:
    """Merges laid slices and puts the leaves together again."""
    merged = run_triple(self._method, parts, self._weights)
    result = {}
    for path, outs in merged.items():
      leaf = self._assemble(path, outs)
      self._check_finite(path, leaf)
      result[path] = leaf
    return result

  def _view(self, path):
    """The view of a leaf, as far as the method must know it."""
    spec = self._specs[path]
    if self._method.view != 'element':
      return axes_lib.view(path, spec)
    return axes_lib.View(axes_lib.stacked(spec), (), ())

  def _assemble(self, path, outs):
    spec, view = self._specs[path], self._view(path)
    kind = self._method.view
    stack_shape = tuple(spec.shape[i] for i in view.stack)
    rest = tuple(n for i, n in enumerate(spec.shape) if i not in view.stack)
    laid = [axes_lib.unlay(out, rest, _unstacked(view), kind) for out in outs]
    if not view.stack:
      return laid[0]
    whole = jnp.stack(laid).reshape(stack_shape + rest)
    return jnp.moveaxis(whole, range(len(view.stack)), view.stack)

  def _check_finite(self, path, leaf):
    if isinstance(leaf, jax.core.Tracer):
      return
    bad = leaf.size - int(jnp.sum(jnp.isfinite(leaf), dtype=jnp.uint32))
    if bad:
      raise errors.UserError(not_finite(path, bad, self._method.needs))


def not_finite(path: str, count: int, needs: Sequence[str] = ()) -> str:
  """The message for a result that has infinite or undefined numbers."""
  cause = (
    'The summed Gram matrix may be singular: lower alpha, collect more '
    'tokens, or give a ridge.'
    if 'gram' in needs
    else 'Look for such numbers in the models, and for weights that cancel.'
  )
  return f'{path}: {count} number(s) of the result are not finite. {cause}'


def _unstacked(view):
  """The view of one slice of a stack."""
  rest = sorted(view.inputs + view.outputs)
  return axes_lib.View(
    (),
    tuple(rest.index(i) for i in view.inputs),
    tuple(rest.index(i) for i in view.outputs),
  )


def lay_slice(leaf, view, at, kind):
  """Slice `at` of a stack, laid before the method."""
  if view.stack:
    leaf = jnp.moveaxis(leaf, view.stack, range(len(view.stack)))[at]
  return axes_lib.lay(leaf, _unstacked(view), kind)


def with_notes(
  marks: Sequence[base_lib.Mark], notes: Sequence[base_lib.Note]
) -> list[base_lib.Mark]:
  """Marks with what a look found added."""
  return [m._replace(note={**m.note, **n}) for m, n in zip(marks, notes)]


def _measured(look, parts, weights):
  result = []
  for part in parts:
    own = [jnp.asarray(w, part.leaves[0].dtype) for w in weights]
    result.append(look.measure(part.leaves, part.base, part.placed(), own))
  return result


def measure(
  look: base_lib.Look, parts: Sequence[Part], weights: Sequence[Any]
) -> list[Any]:
  """What a look without ranks finds, for each part: the same for all."""
  combine = jnp.maximum if look.combine == 'max' else jnp.add
  total, *rest = _measured(look, parts, weights)
  for one in rest:
    total = jax.tree.map(combine, total, one)
  return [total] * len(parts)


def rank(
  look: base_lib.Look,
  parts: Sequence[Part],
  weights: Sequence[Any],
  ranks: Sequence[Sequence[Any]],
) -> list[list[list[numerics.Cut]]]:
  """What a look with ranks finds: `[part][score][rank]` cuts."""
  measured = _measured(look, parts, weights)
  found = [[] for _ in parts]
  indices = [part.placed()[0].index for part in parts]
  for s, wanted in enumerate(ranks):
    scores = [one[s] for one in measured]
    cuts = [
      numerics.largest(scores, jnp.asarray(one, jnp.uint32), indices)
      for one in wanted
    ]
    for p, own in enumerate(found):
      own.append([cut[p] for cut in cuts])
  return found


def run_triple(
  method: base_lib.Merge,
  parts: Mapping[str, Sequence[Part]],
  weights: Sequence[Any],
) -> dict[str, list[typing.Array]]:
  """The triple over laid slices: `{path: results}` for `{path: slices}`."""
  names = {
    path: [path if len(own) == 1 else f'{path}[{j}]' for j in range(len(own))]
    for path, own in parts.items()
  }
  slices = {
    name: part
    for path, own in parts.items()
    for name, part in zip(names[path], own)
  }
  marks = {name: part.placed() for name, part in slices.items()}
  specs = {
    name: tree_lib.leaf_spec(part.leaves[0]) for name, part in slices.items()
  }
  base = {name: part.base for name, part in slices.items()}
  if any(leaf is None for leaf in base.values()):
    base = None
  state = method.init(specs)
  for k, weight in enumerate(weights):
    state = method.update(
      state,
      {name: part.leaves[k] for name, part in slices.items()},
      base=base,
      weight=weight,
      marks={name: own[k] for name, own in marks.items()},
    )
  merged = method.finish(state, base=base)
  return {path: [merged[name] for name in own] for path, own in names.items()}


def _stored(path, leaf, dtype):
  wanted = np.dtype(dtype)
  stored = jax.dtypes.canonicalize_dtype(wanted)
  if stored != wanted:
    logging.warning(
        '%s is %s but JAX is limited to %s; set JAX_ENABLE_X64=1 to keep it.',
        path, wanted, stored,
    )  # fmt: skip
  return leaf.astype(stored)


def _copied(path, reference, inputs):
  leaf = reference.leaf(path)
  for model in inputs:
    if path not in model.specs:
      continue
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
