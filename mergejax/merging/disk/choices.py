# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which method merges a parameter, with which options and weights.

A setting may stand in a rule, below a model, below its slice, below its module
and in the common `parameters:`; the first of them counts. Parameters with equal
options share one built method.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mergejax.core import errors
from mergejax.core import registry
from mergejax.core import typing
from mergejax.merging.disk import layouts
from mergejax.merging.disk import programs
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.merging.recipes import settings
from mergejax.merging.recipes import sources as sources_lib
from mergejax.methods import base as merge_base
from mergejax.methods import entries
from mergejax.methods import mean
from mergejax.methods import named


class Choices:
  """What a recipe chooses for each parameter."""

  def __init__(self, recipe: recipe_lib.Recipe):
    self._recipe = recipe
    self._entries = {
      i: named.entry_of(rule.method)
      for i, rule in enumerate(recipe.rules)
      if rule.method is not None
    }
    self._common = recipe.entry
    self._made: dict[tuple, programs.Settings] = {}

  def entry(self, rule: int | None) -> entries.MethodEntry:
    """The method of the parameters that a rule matches, or no rule."""
    return self._entries.get(rule, self._common)

  def foreign(self, identity: str | None) -> dict[str, str]:
    """`{method: what its numbers depend on beside its name}`.

    Args:
      identity: who vouches for methods that were given as values.
    """
    result = {}
    for entry in (self._common, *self._entries.values()):
      if entry.source is not None:
        result[entry.name] = entry.source
      elif entry.is_value and identity is not None:
        result[entry.name] = identity
    return result

  @property
  def has_values(self) -> bool:
    """True if a method was given as a value rather than by name."""
    return any(e.is_value for e in (self._common, *self._entries.values()))

  def choose(
    self,
    entry: entries.MethodEntry,
    rule: recipe_lib.Rule | None,
    part: layouts.Entry,
    depth: float,
    sources: Sequence[sources_lib.Input],
    refs: Sequence[layouts.Ref],
  ) -> tuple[programs.Settings, tuple[float, ...]]:
    """The method with its options, and a weight for each model.

    Args:
      entry: the method.
      rule: the rule that the parameter falls under, or None.
      part: the parameter of the result.
      depth: how deep it lies, 0 to 1.
      sources: the models, with their own settings.
      refs: their versions of the parameter.

    Raises:
      UserError: options that do not fit the method or its models.
    """
    values = self._values(entry, rule, part, depth, sources, refs)
    weights = values.pop('weight', [None])
    options = dict(entry.recipe_defaults)
    for name, found in values.items():
      value = _joined(part.path, name, found, entry, options)
      if value is not None:
        options[name] = value
    try:
      made = self._settings(entry, options)
      return made, _weights(part.path, made, weights, len(refs))
    except errors.UserError as error:
      raise error.at(entry.name) from error

  def _values(self, entry, rule, part, depth, sources, refs):
    """`{option: its value for each model, None where it has none}`."""
    first = [] if rule is None else [rule.parameters]
    shared = [part.slice.parameters, part.slice.outer, self._recipe.parameters]
    given = {name for place in (*first, *shared) for name in place}
    given.update(name for source in sources for name in source.parameters)
    result = {}
    for name in sorted(given):
      if name != 'weight' and name not in entry.options:
        continue
      # A filter of what models differ in means their names, before stacking.
      by_model = name == 'weight' or entry.options[name].per_model
      result[name] = [
        _first(
          name,
          [*first, source.parameters, *shared],
          ref[1] if by_model else part.path,
          depth,
        )
        for source, ref in zip(sources, refs)
      ] or [_first(name, [*first, *shared], part.path, depth)]
    return result

  def _settings(self, entry, options):
    """The method with these options, built once."""
    key = entry, tuple(
      (name, tuple(value) if isinstance(value, list) else value)
      for name, value in sorted(options.items())
    )  # fmt: skip
    made = self._made.get(key)
    if made is None:
      made = programs.Settings(entry, options, entry.build(**options))
      self._made[key] = made
    return made


def _joined(
  path: typing.Path,
  name: str,
  values: Sequence[Any],
  entry: entries.MethodEntry,
  defaults: Mapping[str, Any],
) -> Any:
  """One value for all models, or a list of one each; None if none has any."""
  if all(value == values[0] for value in values):
    return values[0]
  default = defaults.get(name, entry.options[name].default)
  if None in values and default is registry.Option.empty:
    raise errors.RecipeError(
      f'{path}: {name} is given for some models and not for others.'
    )
  return [default if value is None else value for value in values]


def _weights(path, made, weights, count) -> tuple[float, ...]:
  """A weight for each model, as far as they are checked before merging."""
  given = None
  if made.method.default_weights is None and any(
    weight is not None for weight in weights
  ):
    given = [1.0 if weight is None else weight for weight in weights]
  checked = merge_base.check_weights(made.method, given, count)
  if made.entry.divides(made.options) and abs(sum(checked)) < mean.TINY_WEIGHT:
    flag = made.entry.averages
    instead = f', or `{flag}: false`' if isinstance(flag, str) else ''
    raise errors.RecipeError(
      f'the weights of {path} sum to zero, so their average is not defined; '
      f'give others{instead}.'
    )
  return tuple(float(weight) for weight in checked)


def _first(name, places, path, depth):
  """The value of a setting in the first place that has one."""
  for place in places:
    if name in place:
      value = settings.evaluate(place[name], path, depth)
      if value is not None:
        return value
  return None
