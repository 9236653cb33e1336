# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Makes plans of recipes, from headers alone.

Everything that names, shapes, dtypes, tied parameters, vocabularies and
options can tell is checked here, and everything found wrong is reported at
once, before the first weight is read.
"""

from collections.abc import Mapping
import dataclasses
import os
import re
from typing import Any
import uuid

import jax.numpy as jnp
import numpy as np

from mergejax.checkpoints import buffers
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import stacks
from mergejax.core import statistic_specs
from mergejax.core import typing
from mergejax.merging.disk import adapter_inputs
from mergejax.merging.disk import choices
from mergejax.merging.disk import inputs as inputs_lib
from mergejax.merging.disk import layouts
from mergejax.merging.disk import plans
from mergejax.merging.recipes import chat_templates
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.merging.recipes import settings
from mergejax.methods import named
from mergejax.names import known
from mergejax.names import modules


def plan(
  recipe: recipe_lib.Recipe | os.PathLike | str | Mapping[str, Any],
  *,
  sandbox: os.PathLike | str | None = None,
  identity: str | None = None,
) -> plans.Plan:
  """Works out what a recipe will do, reading headers only.

  Args:
    recipe: from `load_recipe`, the path of a recipe, or its data. In data, a
      method may be a value: `{'merge_method': mj.ties(density=0.3), ...}`.
    sandbox: if given, every path of the recipe must lie in this directory, and
      no method may be named by `package.module:function`.
    identity: what methods that are given as values are known by: a text that
      changes whenever their numbers do. Without it the plan cannot be
      continued by another process, nor its result recognised.

  Returns:
    A plan; `print(plan.describe())` shows it, `execute` runs it.

  Raises:
    UserError: with everything that is wrong.
  """
  imports = sandbox is None
  if isinstance(recipe, Mapping):
    recipe = recipe_lib.parse_recipe(recipe, imports=imports)
  elif not isinstance(recipe, recipe_lib.Recipe):
    recipe = recipe_lib.load_recipe(recipe, imports=imports)
  if not imports and any(
    named.entry_of(method).source is not None for method in recipe.methods()
  ):
    raise errors.RecipeError(
      'a recipe in a sandbox runs nothing: it cannot name a method by '
      '`package.module:function`.'
    )
  of = adapter_inputs.AdapterInputs if recipe.of_adapters else inputs_lib.Inputs
  inputs = of(recipe, sandbox)
  return _Planner(recipe, inputs).plan(identity)


class _Planner:
  """Works out what happens to each parameter; collects every problem."""

  def __init__(self, recipe, inputs):
    self._recipe = recipe
    self._inputs = inputs
    self._problems = inputs.problems
    self._remarks = inputs.remarks
    self._stores = inputs.stores
    self._stats = inputs.stats
    self._reference = inputs.reference
    self._unknown_stacks = {}
    self._used_axes = set()
    self._choices = choices.Choices(recipe)

  def plan(self, identity=None) -> plans.Plan:
    tasks = self._tasks()
    self._inputs.raise_problems()
    self._defaults_remark()
    inputs, recipe = self._inputs, self._recipe
    chosen, said = chat_templates.chosen(recipe.chat_template, recipe.models())
    self._remarks += said
    return plans.Plan(
      dataclasses.replace(recipe, chat_template=chosen), inputs.stores, tuple(inputs.stats), tuple(tasks),
      inputs.reference, inputs.tied, inputs.repeated, inputs.config,
      inputs.tokenizer, tuple(inputs.remarks),
      self._choices.foreign(identity or uuid.uuid4().hex),
      self._choices.has_values and identity is None,
    )  # fmt: skip

  def _defaults_remark(self):
    self._remarks += self._recipe.notes
    entry = self._recipe.entry
    chosen = {
      name: value
      for name, value in entry.recipe_defaults.items()
      if name not in self._recipe.parameters
    }
    if chosen:
      words = ', '.join(f'{k}={v}' for k, v in chosen.items())
      self._remarks.append(
        f"mergekit's defaults where the recipe is silent: {words} "
        f"(`mergejax methods {entry.name}` tells the paper's)"
      )

  # Tasks ---------------------------------------------------------------------

  def _tasks(self) -> list[plans.Task]:
    recipe = self._recipe
    entries = layouts.lay_out(recipe, self._inputs)
    if self._problems:
      return []
    tasks = []
    used_rules: set[int] = set()
    counts = modules.layer_counts(entry.path for entry in entries)
    for entry in entries:
      if entry.depth is None:
        entry = entry._replace(depth=_depth(entry.path, counts))
      task = self._inputs.attempt(self._task, entry, used_rules)
      if task is not None:
        tasks.append(task)
    if not counts and any(map(settings.is_gradient, recipe.settings())):
      self._problems.append(
        'a gradient gives every layer a value of its own, but no parameter is '
        f'in a numbered layer (first: {entries[0].path}): give one value '
        'instead. Layers that are stacked in one array cannot have several.'
      )
    if self._unknown_stacks:
      self._problems.append(stacks.message(self._unknown_stacks))
    for i, rule in enumerate(recipe.rules):
      if i not in used_rules:
        self._problems.append(
          f'rule {i} ({rule.match!r}) is the first match of no parameter.'
        )
    self._problems += [
      f'axes: {pattern!r} matches no parameter.'
      for pattern, _ in recipe.axes
      if pattern not in self._used_axes
    ]
    if self._stats and not any(any(task.stats) for task in tasks):
      self._problems.append(
        'these statistics are of no parameter of the models: are they of '
        f'another model? {self._stats[0].name} begins with:\n'
        f'{errors.listed(list(self._stats[0].specs()), 3)}'
      )
    if self._stats and len(self._stats) != len(recipe.slices[0].inputs):
      self._problems.append(
        f"{len(self._stats)} 'stats' for {len(recipe.slices[0].inputs)} "
        'models: give one for each, in their order.'
      )
    return tasks

  def _task(self, entry, used_rules) -> plans.Task:
    recipe = self._recipe
    path, depth, _, refs, base, copied = entry
    number, rule = next(
      (
        (i, rule)
        for i, rule in enumerate(recipe.rules)
        if re.fullmatch(rule.match, path)
      ),
      (None, None),
    )
    used_rules.add(number)
    spec = self._with_axes(path, refs, base)
    stored = spec
    # Changes are rounded once, when they are factors.
    dtype = None if recipe.of_adapters else recipe.dtype
    if dtype and numerics.is_averaged(spec.dtype):
      stored = typing.LeafSpec(
        spec.shape, np.dtype(jnp.dtype(dtype)), spec.axes
      )
    elif spec.dtype != (lead := self._lead_dtype(refs, base)):
      stored = typing.LeafSpec(spec.shape, lead, spec.axes)
    copy = None
    if rule is not None and rule.copy is not None:
      if rule.copy == 'base' and not recipe.base:
        raise errors.RecipeError(
          f'{path}: a rule copies the base; none is given.'
        )
      copy = (recipe.base if rule.copy == 'base' else rule.copy, path)
    elif (
      copied
      or buffers.is_buffer(path, spec)
      or not numerics.is_averaged(spec.dtype)
      or not spec.size
    ):
      copy = refs[0] if base is None else base
    if copy is not None:
      found = self._stores[copy[0]].specs().get(copy[1])
      if found is None or found.shape != spec.shape:
        raise errors.RecipeError(
          f'{path} cannot be copied from {copy[0]}: it '
          + ('lacks it.' if found is None else f'is {list(found.shape)} there.')
        )
      return plans.Task(path, stored, None, (), (copy,), None)
    method = self._choices.entry(number)
    return self._merge_task(entry, depth, stored, method, rule)

  def _merge_task(self, entry, depth, spec, method, rule):
    refs, sources, base = entry.refs, entry.slice.inputs, entry.base
    if method.base_policy == 'ignored':
      base = None
    elif base is not None:
      kept = [k for k, source in enumerate(sources) if source.model != base[0]]
      kept = [k for k in kept if k < len(refs)]
      refs, sources = [refs[k] for k in kept], [sources[k] for k in kept]
    elif method.base_policy == 'required':
      self._problems.append(
        f'{method.name} works on differences from a base model: give '
        '`base_model:`.'
      )
    settings, weights = self._choices.choose(
      method, rule, entry, depth, sources, refs
    )
    built, path = settings.method, entry.path
    self._check_shapes(path, spec, refs, base)
    if built.numbers_elements:
      numerics.check_countable(path, axes_lib.slice_size(spec))
    if built.of_whole_leaves and stacks.may_be_stack(path, spec):
      self._unknown_stacks[path] = spec
      return None
    if built.view != 'element':
      axes_lib.view(path, spec)
    stats = self._stats_of(path, spec, built, refs)
    task = plans.Task(path, spec, settings, weights, tuple(refs), base, stats)
    if not built.separable:
      raise errors.RecipeError(
        f'{method.name} merges parameters together (`separable=False`), and '
        'from disk each is merged by itself. Merge in memory with `mj.merge`.'
      )
    if built.has_tree_passes and not task.in_pieces:
      raise errors.RecipeError(
        f'{path}: {method.name} with these options looks at the whole model, '
        'and then at each layer of this stack by itself, which is not done '
        'from disk. Merge in memory with `mj.merge`, or choose options that look at '
        'single parameters (`trim_scope: tensor`, or `rescale: none`).'
      )
    return task

  def _stats_of(self, path, spec, method, refs):
    if not method.needs:
      return ()
    if len(self._stats) != len(refs):
      raise errors.RecipeError(
        f'this method needs `stats:`, one path for each of the {len(refs)} '
        f'models, {len(self._stats)} given. `mergejax stats` collects them.'
      )
    have = any(
      f'{path}/{need.name}' in store.specs()
      for need in method.statistics
      for store in self._stats
    )
    found = {}
    for need in method.statistics:
      if need.required == 'some' and not have:
        continue
      name = found[need.name] = f'{path}/{need.name}'
      wanted = need.shape(path, spec)
      for store in self._stats:
        if name not in store.specs():
          raise errors.RecipeError(f'{store.name} lacks {name}.')
        shape = store.specs()[name].shape
        if not statistic_specs.matches(shape, wanted):
          raise errors.RecipeError(
            f'{store.name}: {name} is {list(shape)}, which does not fit {path} '
            f'{list(spec.shape)}. Are these the statistics of another model?'
          )
    return tuple(dict(found) for _ in self._stats)

  def _with_axes(self, path, refs, base):
    """The spec of the base or first model, with axes: the recipe's come first."""
    specs = [self._spec(ref) for ref in (base, *refs) if ref is not None]
    rules = [rule for rule in self._recipe.axes if re.fullmatch(rule[0], path)]
    self._used_axes.update(pattern for pattern, _ in rules)
    if rules:
      return axes_lib.with_axes({path: specs[0]}, rules[:1])[path]
    return axes_lib.agreed(path, specs)

  def _spec(self, ref):
    model, path = ref
    found = self._stores[model].specs().get(path)
    if found is None:
      raise errors.RecipeError(f'{model} lacks {path}.')
    return found

  def _lead_dtype(self, refs, base):
    """dtype of the base, or of the first model, as stored, adapters aside."""
    model, path = refs[0] if base is None else base
    return self._stores[model].stored_dtype(path)

  def _check_shapes(self, path, spec, refs, base):
    for ref in [*refs, *([base] if base else [])]:
      own = self._spec(ref)
      if own.shape != spec.shape or not numerics.is_averaged(own.dtype):
        raise errors.RecipeError(
          f'{path}: {ref[1]} of {ref[0]} is {own.dtype.name} '
          f'{list(own.shape)}, expected {spec.dtype.name} {list(spec.shape)}.'
        )


def _depth(path, counts) -> float:
  """0 at the first layer, 1 at the last; 0 outside of the layers."""
  match = known.LAYER.fullmatch(path)
  if match:
    count = counts[match['stem']]
    return int(match['index']) / (count - 1) if count > 1 else 1.0
  # As mergekit: a head is no part of the last layer.
  return 0.0
