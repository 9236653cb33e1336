# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax methods [NAME]`: the menu, or one method's page."""

from collections.abc import Sequence
import inspect

from mergejax.cli import common
from mergejax.methods import named


def main(arguments: Sequence[str]) -> None:
  """Prints every method with its options, or the documentation of one."""
  parser = common.parser('methods', 'The merge methods and their options.')
  parser.add_argument('name', nargs='?')
  options = parser.parse_args(arguments)
  if options.name:
    print(options.name + str(inspect.signature(named.METHODS[options.name])))
    print(inspect.getdoc(named.METHODS[options.name]))
    return
  print(
    "Options as in Python; recipes say `lambda` for `scale`. Where mergekit's"
  )
  print(
    'default differs, a recipe gets that of mergekit, shown after `recipe:`.'
  )
  for name in named.METHODS:
    first = inspect.getdoc(named.METHODS[name]).splitlines()[0]
    settings = ', '.join(map(str, named.METHODS.options(name).values()))
    print(f'{name:<16} {first}\n{"":<16} {settings}')
    other = named.METHODS.entry(name).recipe_defaults
    if other:
      words = ', '.join(f'{k}={v}' for k, v in other.items())
      print(f'{"":<16} recipe: {words}')
