# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is known of a merge method before it is built: its registry entry.

A method registers itself where it is defined, with every trait that planners,
searches and recipes ask about:

    @entries.register('ties', base='required', counted=('density',))
    def ties(*, density: Any = 0.2, ...) -> base.Merge:
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

from mergejax.core import errors
from mergejax.core import registry
from mergejax.methods import base as base_lib

WHAT = 'merge method'
# What stands in the place of a name where a method was given as a value.
VALUE = 'a Merge from Python'


@dataclasses.dataclass(frozen=True, eq=False)
class MethodEntry(registry.Entry):
  """A merge method by name.

  Options, their kinds, which of them differ by model (annotated `Any`) and
  which are static (flags, words and whole numbers, for which a program is
  compiled) are read from the constructor.

  Attributes:
    base: what it wants of a base: 'required', 'optional' or 'ignored'; None if
      only the built method tells.
    averages: it divides by the sum of its weights, which must not be zero:
      True, or the flag among its options that says so.
    counted: options that count elements, so that their numbers must be known
      when a merge is compiled.
    recipe_names: `{option: its name in recipes}` where the two differ. By
      default `scale` is the `lambda` of the papers.
    recipe_defaults: `{option: value}` that a recipe gets where mergekit's
      default is not the paper's.
    source: sha256 of the file of a method from outside the package, which
      results owe their numbers to; None for methods of the package.
    value: the method itself, if it was given instead of a name.
  """

  base: str | None = None
  averages: bool | str = False
  counted: tuple[str, ...] = ()
  recipe_names: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {'scale': 'lambda'}
  )
  recipe_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: str | None = None
  value: base_lib.Merge | None = None

  @property
  def is_value(self) -> bool:
    """True if a built method was given, which has no options and no name."""
    return self.value is not None

  @functools.cached_property
  def options(self) -> Mapping[str, registry.Option]:
    return {} if self.is_value else super().options

  @functools.cached_property
  def base_policy(self) -> str:
    """'required', 'optional' or 'ignored': what it wants of a base."""
    if self.base is not None:
      return self.base
    needed = {
      name: _VALUES[option.kind]
      for name, option in self.options.items()
      if option.default is option.empty
    }
    try:
      return self.build(**needed).base
    except errors.UserError as error:
      raise errors.ConfigError(
        f'{error.message} Whether the method works on differences from a base '
        'was to be learnt by building it; say so where it is defined: '
        "`@mergejax.methods.entries.register(NAME, base='required')` (or "
        "'optional', or 'ignored')."
      ) from error

  def build(self, **options: Any) -> base_lib.Merge:
    """The method with its options; see `registry.Entry.build`.

    Raises:
      ConfigError: options that do not fit, or a function that gives no `Merge`.
    """
    if self.value is not None:
      if options:
        raise errors.ConfigError(
          f'{sorted(options)} belong to the constructor of the method: build '
          'it with them, or pass the name of the method.'
        )
      return self.value
    built = super().build(**options)
    if not isinstance(built, base_lib.Merge):
      raise errors.ConfigError(
        f'The merge method {self.name!r} should return a Merge, as '
        f'`mj.linear()` does, not {type(built).__name__}.'
      )
    return built

  def recipe_name(self, option: str) -> str:
    """How recipes call an option."""
    return self.recipe_names.get(option, option)

  def divides(self, options: Mapping[str, Any]) -> bool:
    """True if the method with these options divides by its weights' sum."""
    if isinstance(self.averages, str):
      return bool(
        options.get(self.averages, self.options[self.averages].default)
      )
    return self.averages

  def split(
    self, options: Mapping[str, Any]
  ) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Options that a program is compiled for, and those that it is given.

    Args:
      options: values by name; a list has one a model.

    Returns:
      `(((name, value), ...), {name: number or list of numbers})`.
    """
    static, numbers = {}, {}
    for name, value in options.items():
      values = value if isinstance(value, (list, tuple)) else [value]
      number = all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
      )
      option = self.options[name]
      # Whoever annotates nothing may count with it, or branch on it.
      if option.static or option.kind == 'value' or not number:
        static[name] = tuple(value) if isinstance(value, list) else value
      else:
        numbers[name] = value
    return tuple(sorted(static.items())), numbers


METHODS = registry.Registry(WHAT, MethodEntry)
# Values that most options of a kind may have.
_VALUES = {
  'number': 0.5,
  'whole number': 1,
  'flag': False,
  'word': '',
  'value': 0.5,
}


def register(
  name: str, **traits: Any
) -> Callable[[Callable[..., base_lib.Merge]], Callable[..., base_lib.Merge]]:
  """Decorator that makes a constructor a method of the menu.

  Args:
    name: how recipes call it.
    **traits: fields of `MethodEntry`; `base` must be among them.
  """
  if 'base' not in traits:
    raise ValueError(f'{name}: say what the method wants of a base.')
  return METHODS.register(name, **traits)
