# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of sparse layers, for whatever makes such models or changes them."""

from collections.abc import Mapping
import dataclasses
import re

import flax.linen as nn
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.nn import moe_config
from mergejax.nn import transformer

KERNEL = re.compile(r'(?P<layer>.*/mlp)/expert/(?P<name>\w+)/kernel')
ROUTER = 'router/router_weights/w/kernel'
# Parameters by their paths, 'decoder/layers_1/mlp/expert/wo/kernel'.
Leaves = dict[typing.Path, np.ndarray]


def family_of(
  model: nn.Module | models.ModelFamily, *, sparse: bool
) -> models.ModelFamily:
  """The family of a model of the layers of T5, with experts or without.

  Raises:
    ConfigError: a model of other layers, or one that has no experts, or has.
  """
  family = models.family_of(model)
  config = family.config
  if not isinstance(config, transformer.StackConfig):
    raise errors.ConfigError(
      f'{family.model_type} models have no layers that could have experts: '
      'families t5x and lm do.'
    )
  if (config.moe is not None) != sparse:
    raise errors.ConfigError(
      'The model has no experts, and they are what this is about.'
      if sparse
      else 'The model has experts already.'
    )
  return family


def with_moe(
  family: models.ModelFamily, moe: moe_config.MoeConfig | None
) -> models.ModelFamily:
  """The family with the experts of another configuration, or none."""
  config = dataclasses.replace(family.config, moe=moe)
  return models.family_of(type(family.module)(config))


def unstacked(family: models.ModelFamily, params: typing.Tree) -> Leaves:
  """`{path: array}` of the layers one by one, on the host."""
  specs = family.specs()
  axes = {path: spec.axes for path, spec in specs.items() if spec.axes}
  leaves = one_by_one(family).arranged(tree_lib.flatten(params), axes)
  return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def of_sparse(family: models.ModelFamily, params: typing.Tree) -> Leaves:
  """`unstacked`, of a sparse model's parameters.

  Raises:
    StructureError: they are those of another model.
  """
  leaves = unstacked(family, params)
  tree_lib.check_same(
    one_by_one(family).specs(), tree_lib.specs(leaves),
    expected_name='the sparse model', given_name='The tree given',
  )  # fmt: skip
  return leaves


def one_by_one(family: models.ModelFamily) -> models.ModelFamily:
  """The family without a scan over its layers."""
  config = dataclasses.replace(family.config, scan_layers=False)
  return models.family_of(type(family.module)(config))


def stacked(family: models.ModelFamily, leaves: Leaves) -> typing.Tree:
  """The tree of a family from its layers one by one.

  Raises:
    StructureError: parameters that the family does not have, or lacks.
  """
  found = family.arranged(leaves)
  specs = family.specs()
  tree_lib.check_same(
    specs, tree_lib.specs(found), expected_name='the model asked for',
    given_name='what was made',
  )  # fmt: skip
  return tree_lib.unflatten({path: found[path] for path in specs})


def layers(leaves: Mapping[typing.Path, np.ndarray]) -> dict[str, list[str]]:
  """`{sparse layer: names of its kernels}`, in the order of the leaves."""
  found: dict[str, list[str]] = {}
  for path in leaves:
    match = KERNEL.fullmatch(path)
    if match:
      found.setdefault(match['layer'], []).append(match['name'])
  return found


def kernel(layer: str, name: str) -> typing.Path:
  """The path of the kernels of a layer's experts."""
  return f'{layer}/expert/{name}/kernel'


def is_output(name: str) -> bool:
  """Whether a kernel is the last of a block, whose rows are hidden units."""
  return name == 'wo'
