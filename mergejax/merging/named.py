# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The menu: merge methods by the names that recipes use."""

from mergejax import errors
from mergejax import registry
from mergejax.merging import arithmetic
from mergejax.merging import base
from mergejax.merging import mean

METHODS = registry.Registry('merge method')
METHODS.register('linear')(mean.linear)
METHODS.register('interpolate')(mean.interpolate)
METHODS.register('task_arithmetic')(arithmetic.task_arithmetic)
METHODS.register('negate')(arithmetic.negate)
METHODS.register('analogy')(arithmetic.analogy)


def resolve(method: str | base.Merge, **options) -> base.Merge:
  """A method from its name and options, or the method itself.

  Raises:
    UserError: unknown name or option (near ones are offered), a missing
      option, or options given beside a method that is already built.
  """
  if isinstance(method, base.Merge):
    if options:
      raise errors.UserError(
        f'{sorted(options)} belong to the constructor of the method: build '
        'it with them, or pass the name of the method.'
      )
    return method
  return METHODS.build(method, **options)
