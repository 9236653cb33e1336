# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs a merge method over trees and stores: first passes, then the triple."""

from collections.abc import Mapping, Sequence
import logging
import re
from typing import Any

import jax
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import stacks
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.merging import engine
from mergejax.merging import finite
from mergejax.merging import given
from mergejax.merging import parts as parts_lib
from mergejax.methods import base as base_lib
from mergejax.methods import masks

# What a rule says for leaves that are not merged.
COPY = 'copy'


class Source:
  """One input of a merge, a tree or a store, read leaf by leaf."""

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

  def leaf(self, path: typing.Path) -> typing.Array:
    if self._store is None:
      return self._leaves[path]
    return tree_lib.flatten(self._store.read([path]))[path]

  def layout(self, path: typing.Path) -> Any:
    """The sharding of a leaf of a tree; stores have none."""
    leaf = None if self._store is not None else self._leaves[path]
    return getattr(leaf, 'sharding', None)


def merge(
  models: Sequence[Any],
  method: base_lib.Merge,
  *,
  base: Any = None,
  weights: Sequence[Any] | typing.Array | None = None,
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
      path does not tell, or that are stacks of layers: each layer is then a
      leaf of its own. Methods that are the same for a stack and its layers
      need none; random masks are then drawn for the stack as one leaf.
    rules: `(regular expression, method)` for leaves that are to be merged
      otherwise, or `'copy'` to take them from the base or the first model; the
      first full match of a path decides. A method that looks at the whole
      model sees the leaves that it merges, by however many rules.
    dtype: dtype of floating leaves of the result; by default as in the base,
      else as in the first model.
    seed: seeds random methods; keys are made of seed, path and model.

  Returns:
    A tree of the structure of the first model. Floating leaves are accumulated
    in float32 (float64 if stored so) and cast once. Other leaves (step
    counters, ids) are copied from the base or the first model.

  Raises:
    UserError: no model, no base where one is needed, differing trees (listed),
      weights or statistics that do not fit; parameters that may be stacks of
      layers under a method that needs numbers of whole parameters (see `stacks`); a
      model, a statistic or a result that is not finite, or that the dtype of
      the result cannot hold. Arrays that JAX traces cannot be looked at: under
      `jit` such numbers go through.
  """
  if not models:
    raise errors.ConfigError(
      'A merge needs at least one model; none was given.'
    )
  inputs = [Source(m, f'model {i}') for i, m in enumerate(models)]
  base_input = None if base is None else Source(base, 'the base')
  check_call(method, weights, len(inputs), base_input)
  reference = base_input or inputs[0]
  _check_rules(rules)
  _check_trees(rules, reference, inputs)
  every = [one.specs for one in (reference, *inputs)]
  specs = axes_lib.of_models(every, axes)
  groups = _by_rule(rules, method, merged_paths(specs))
  _check_stacks(groups, specs)
  result = {}
  for own, paths in groups:
    if own == COPY:
      for path in paths:
        leaf = reference.leaf(path)
        finite.check_inputs(path, [leaf], [reference.name])
        result[path] = finite.stored(path, leaf, dtype) if dtype else leaf
      continue
    merged = _merge_leaves(
        own, paths, specs, inputs, base_input, weights, stats, seed,
    )  # fmt: skip
    for path, leaf in merged:
      kind = dtype or specs[path].dtype
      result[path] = finite.stored(path, leaf, kind, own.statistics)
      layout = inputs[0].layout(path)
      if isinstance(layout, jax.sharding.NamedSharding):
        if not numerics.is_traced(leaf):
          result[path] = jax.device_put(result[path], layout)
  for path, spec in reference.specs.items():
    if path not in result:
      result[path] = copied(path, reference, inputs)
      if dtype and numerics.is_averaged(spec.dtype):  # empty
        result[path] = finite.stored(path, result[path], dtype)
  alike = inputs[0].specs.keys() == reference.specs.keys()
  if inputs[0].structure is not None and alike:
    return jax.tree.unflatten(
      inputs[0].structure, [result[path] for path in inputs[0].specs]
    )
  return tree_lib.unflatten({path: result[path] for path in reference.specs})


def merged_paths(specs: typing.SpecTree) -> list[typing.Path]:
  """The leaves that are merged: others hold no floating numbers, or none."""
  return [
    path
    for path, spec in specs.items()
    if numerics.is_averaged(spec.dtype) and spec.size
  ]


def _check_stacks(groups, specs):
  """Raises if a method must know the layout of leaves, and nothing says it."""
  whole = [
    (own, path)
    for own, paths in groups
    if own != COPY and own.of_whole_leaves
    for path in paths
  ]
  stacks.check_known(specs, [path for _, path in whole])
  for own, path in whole:
    if own.view != 'element':
      axes_lib.view(path, specs[path])


def _check_rules(rules):
  """Raises if a rule has no regular expression, or says no method."""
  for pattern, method in rules:
    tree_lib.expression(pattern, 'rule')
    if isinstance(method, str) and method != COPY:
      raise errors.ConfigError(
        f'The rule {pattern!r} should give a method, such as mj.linear(), or '
        f'{COPY!r}, not {method!r}.'
      )


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
      raise errors.StructureError(
        f'{error.message} Leaves that need not agree, such as heads of other '
        f"sizes, can be those of {reference.name}: `rules=[('PATH', 'copy')]`."
      ) from error


def check_call(method, weights, count, base_input):
  """The weights, if method, models and base fit together.

  Raises:
    UserError: they do not; see `merge`.
  """
  weights = base_lib.check_weights(method, weights, count)
  if method.base == 'required' and base_input is None:
    raise errors.ConfigError(
      'This method works on differences from a common ancestor: give it with '
      '`base=` (in a recipe: `base_model:`).'
    )
  return weights


def _by_rule(rules, method, paths):
  """`[(method, paths)]`: the leaves of all rules that give one method."""
  table = [*rules, ('.*', method)]
  chosen = {}
  for path in paths:
    chosen[path] = next(
      i for i, (pattern, _) in enumerate(table) if re.fullmatch(pattern, path)
    )
  unused = [table[i][0] for i in range(len(rules)) if i not in chosen.values()]
  if unused:
    raise errors.ConfigError(
      f'These rules are the first match of no leaf:\n{errors.listed(unused)}'
    )
  groups: dict[Any, tuple[Any, list[typing.Path]]] = {}
  for path in paths:
    # By identity: functions that were made alike do not compare as equal.
    treatment = table[chosen[path]][1]
    groups.setdefault(id(treatment), (treatment, []))[1].append(path)
  return list(groups.values())


def _merge_leaves(
  method, paths, specs, inputs, base_input, weights, stats, seed
):
  """Yields `(path, merged leaf)` for leaves that one method merges."""
  weights = check_call(method, weights, len(inputs), base_input)
  stats = given.check(method, stats, [one.name for one in inputs], paths, specs)
  if method.base == 'ignored':
    base_input = None
  run = Run(method, weights, specs, seed)

  def laid(path):
    leaves = [one.leaf(path) for one in inputs]
    origin = None if base_input is None else base_input.leaf(path)
    known = [*leaves, *([] if origin is None else [origin])]
    names = [one.name for one in (*inputs, base_input) if one is not None]
    finite.check_inputs(path, known, names)
    return run.laid(path, leaves, origin, [one.get(path) for one in stats])

  together = {}
  if method.has_tree_passes:
    together = {path: laid(path) for path in paths}
    run.first_passes(
      [leaf for own in together.values() for leaf in own], 'tree'
    )
  for group in [[p] for p in paths] if method.separable else [paths]:
    slices = {p: together.pop(p, None) or laid(p) for p in group}
    yield from run.finish(slices).items()


class Run:
  """One method over the leaves of one set of models."""

  def __init__(self, method, weights, specs, seed, first=0):
    """Reads nothing yet; for `first` see `parts.Layout`."""
    self._method = method
    self._first = first
    self._weights = list(weights)
    self._specs = specs
    self._seed = seed
    self._layouts: dict[str, parts_lib.Layout] = {}

  def layout(self, path: str) -> parts_lib.Layout:
    """How a leaf is laid before the method."""
    found = self._layouts.get(path)
    if found is None:
      spec = self._specs[path]
      found = parts_lib.Layout(path, spec, self._method, self._first)
      self._layouts[path] = found
    return found

  def laid(self, path, leaves, base, stats) -> list[engine.ArrayLeaf]:
    """The slices of one leaf, laid for the method, with their contexts."""
    needs, layout = self._method.statistics, self.layout(path)
    wide = [numerics.widen(leaf) for leaf in leaves]
    base = None if base is None else numerics.widen(base)
    result = []
    for name, at in layout.slices:
      contexts = []
      for k, own in enumerate(stats):
        own = own and {
          need.name: layout.cut_statistic(need, own[need.name], at)
          for need in needs
          if need.name in own
        }
        key = masks.mask_key(self._seed, name, k)
        contexts.append(base_lib.LeafContext(k, {}, key, stats=own))
      part = parts_lib.Part(
        [layout.cut(leaf, at) for leaf in wide],
        None if base is None else layout.cut(base, at),
        contexts,
      )
      result.append(engine.ArrayLeaf(self._method, part, self._weights))
    return result

  def first_passes(self, leaves: list[engine.ArrayLeaf], scope: str) -> None:
    """Runs the first passes of one scope over leaves taken together."""
    engine.run_first_passes(self._method, leaves, scope, engine.array_cuts)

  def finish(
    self, slices: dict[str, list[engine.ArrayLeaf]]
  ) -> dict[str, typing.Array]:
    """Merges laid slices, each by itself, and puts leaves together again."""
    parts = {}
    for path, leaves in slices.items():
      for (name, _), leaf in zip(self.layout(path).slices, leaves):
        self.first_passes([leaf], 'leaf')
        parts[name] = leaf.part
    merged = parts_lib.run_triple(self._method, parts, self._weights)
    return {
      path: self.layout(path).join(
        [merged[name] for name, _ in self.layout(path).slices]
      )
      for path in slices
    }


def copied(
  path: typing.Path, reference: Source, inputs: Sequence[Source]
) -> typing.Array:
  """A leaf that is not averaged: the reference's; says if a model differs."""
  leaf = reference.leaf(path)
  for model in inputs:
    if path not in model.specs:
      continue
    other = model.leaf(path)
    if numerics.is_traced(leaf) or numerics.is_traced(other):
      continue
    if not np.array_equal(np.asarray(leaf), np.asarray(other)):
      logging.warning(
          '%s is not a floating array and is not averaged; %s and %s differ '
          'in it, the former is kept.', path, reference.name, model.name,
      )  # fmt: skip
      break
  return leaf
