# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What lies where: logical axes of arrays, to axes of a mesh."""

from collections.abc import Mapping
import dataclasses

from mergejax.core import errors
from mergejax.partition import meshes

# What an axis of an array is spread over: an axis of the mesh, several (the
# first one outermost), or none.
Target = str | tuple[str, ...] | None

# T5X's standard rules, with the two axes of experts and those of images added.
_PARAMS: Mapping[str, Target] = {
  'branch': 'branch',
  'expert': 'expert',
  'expert_mlp': 'model',
  'mlp_embed': None,
  'unmodeled': None,
  'vocab': 'model',
  'mlp': 'model',
  'heads': 'model',
  'joined_kv': 'model',
  'embed': None,
  'kv': None,
  'relpos_buckets': None,
  'length': None,
  'layers': None,
  'height': None,
  'width': None,
  'channels': None,
  'classes': None,
  'one': None,
  'experts': None,
  'rank': None,
  'routes': None,
  'tasks': None,
  'inputs': None,
  'outputs': None,
}
ACTIVATIONS: Mapping[str, Target] = {
  **_PARAMS,
  'batch': ('data', 'expert'),
  # Of what experts were sent: groups, of which every `data` slice has its own.
  'expert_replicas': 'data',
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Which axis of the mesh a logical axis is spread over.

  Attributes:
    params: `{logical axis: mesh axis, several, or None}` for parameters and
      what follows them: moments of an optimizer, running averages. None is a
      whole copy on every slice.
    activations: likewise for batches and what a model computes of them.

  Example:
    >>> rules = ShardingRules().replace(params={'embed': ('data', 'expert')})
    >>> rules.params['embed'], rules.params['mlp']
    (('data', 'expert'), 'model')
  """

  params: Mapping[str, Target] = dataclasses.field(
    default_factory=lambda: dict(_PARAMS)
  )
  activations: Mapping[str, Target] = dataclasses.field(
    default_factory=lambda: dict(ACTIVATIONS)
  )

  def __post_init__(self):
    for kind in ('params', 'activations'):
      for name, target in getattr(self, kind).items():
        for axis in mesh_axes(target):
          if axis not in meshes.AXES:
            wrong = errors.near(axis, meshes.AXES, 'mesh axis')
            raise errors.ConfigError(f'The rule {name!r} of {kind}: {wrong}')

  def replace(
    self,
    params: Mapping[str, Target] | None = None,
    activations: Mapping[str, Target] | None = None,
  ) -> 'ShardingRules':
    """The same rules but for those given; unknown names are new rules."""
    return ShardingRules(
      {**self.params, **(params or {})},
      {**self.activations, **(activations or {})},
    )


def standard() -> ShardingRules:
  """T5X's standard rules: tensor parallelism over `model`, rows over `data`."""
  return ShardingRules()


def fsdp() -> ShardingRules:
  """The standard rules, with parameters and moments spread over `data` too.

  No device holds a whole parameter; each is gathered where it is used.

  Source: Zhao et al., "PyTorch FSDP" (2023), https://arxiv.org/abs/2304.11277.
  """
  return ShardingRules().replace(params={'embed': 'data', 'mlp_embed': 'data'})


def mesh_axes(target: Target) -> tuple[str, ...]:
  """The axes of the mesh that a target names, in its order."""
  return (target,) if isinstance(target, str) else tuple(target or ())
