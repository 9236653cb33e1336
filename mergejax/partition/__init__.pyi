# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.partition.activations import active_mesh
from mergejax.partition.activations import active_spec
from mergejax.partition.activations import by_shard
from mergejax.partition.activations import constrain
from mergejax.partition.activations import device_count
from mergejax.partition.activations import platform
from mergejax.partition.activations import rows_alone
from mergejax.partition.activations import rules_of
from mergejax.partition.layouts import init_sharded
from mergejax.partition.layouts import replicated
from mergejax.partition.layouts import sharding
from mergejax.partition.layouts import shardings
from mergejax.partition.layouts import spec_for
from mergejax.partition.layouts import to_host
from mergejax.partition.meshes import AXES
from mergejax.partition.meshes import AnyMesh
from mergejax.partition.meshes import abstract_mesh
from mergejax.partition.meshes import join_processes
from mergejax.partition.meshes import make_mesh
from mergejax.partition.rules import ShardingRules
from mergejax.partition.rules import Target
from mergejax.partition.rules import fsdp
from mergejax.partition.rules import standard

__all__ = [
  'AXES',
  'AnyMesh',
  'ShardingRules',
  'Target',
  'abstract_mesh',
  'active_mesh',
  'active_spec',
  'by_shard',
  'constrain',
  'device_count',
  'fsdp',
  'init_sharded',
  'join_processes',
  'make_mesh',
  'platform',
  'replicated',
  'rows_alone',
  'rules_of',
  'sharding',
  'shardings',
  'spec_for',
  'standard',
  'to_host',
]
