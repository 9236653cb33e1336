# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The menu: merge methods by the names that recipes use."""

from mergejax.core import errors
from mergejax.core import registry
from mergejax.methods import arithmetic
from mergejax.methods import base
from mergejax.methods import fisher
from mergejax.methods import mean
from mergejax.methods import ram
from mergejax.methods import regmean
from mergejax.methods import select_erase
from mergejax.methods import sphere
from mergejax.methods import swap
from mergejax.methods import ties

METHODS = registry.Registry('merge method')
for _name, _constructor in {
  'analogy': arithmetic.analogy,
  'arcee_fusion': swap.arcee_fusion,
  'breadcrumbs': ties.breadcrumbs,
  'breadcrumbs_ties': ties.breadcrumbs_ties,
  'dare_linear': ties.dare_linear,
  'dare_ties': ties.dare_ties,
  'della': ties.della,
  'della_linear': ties.della_linear,
  'fisher': fisher.fisher,
  'interpolate': mean.interpolate,
  'karcher': sphere.karcher,
  'linear': mean.linear,
  'model_stock': sphere.model_stock,
  'multislerp': sphere.multislerp,
  'nearswap': swap.nearswap,
  'negate': arithmetic.negate,
  'nuslerp': sphere.nuslerp,
  'passthrough': mean.passthrough,
  'ram': ram.ram,
  'ram_plus': ram.ram_plus,
  'regmean': regmean.regmean,
  'sce': select_erase.sce,
  'slerp': sphere.slerp,
  'task_arithmetic': arithmetic.task_arithmetic,
  'ties': ties.ties,
}.items():
  METHODS.register(_name)(_constructor)


def base_policy(method: str) -> str:
  """'required', 'optional' or 'ignored': what a method wants of a base."""
  needed = {
    name: 0.5
    for name, parameter in METHODS.options(method).items()
    if parameter.default is parameter.empty
  }
  return resolve(method, **needed).base


def resolve(method: str | base.Merge, **options) -> base.Merge:
  """A method from its name and options, or the method itself.

  Raises:
    UserError: unknown name or option (near ones are offered), a missing
      option, or options given beside a method that is already built.
  """
  if isinstance(method, base.Merge):
    if options:
      raise errors.ConfigError(
        f'{sorted(options)} belong to the constructor of the method: build '
        'it with them, or pass the name of the method.'
      )
    return method
  return METHODS.build(method, **options)
