# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Chips by name, and slices of them that are only described.

The TPU compiler runs on any machine: it needs a description of the devices, not
the devices.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import os
import re
from typing import Any

from jax.experimental import topologies

from mergejax.core import errors


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do; peaks, as its maker states them.

  Attributes:
    kind: `device_kind` of its devices.
    memory: bytes of HBM that the compiler gives a program, a little less than
      the chip has.
    flops: bfloat16 operations a second.
    memory_bandwidth: bytes of HBM a second.
    ici: bytes a second that a chip sends over all of its links to other chips
      of its slice, one way.
    dcn: bytes a second that a chip sends to other slices: the network cards of
      its host, shared by the host's chips.
    dimensions: of the torus that its slices are.
  """

  kind: str
  memory: int
  flops: float
  memory_bandwidth: float
  ici: float
  dcn: float
  dimensions: int


_GIB = 2**30
# Source: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e, tables of
# key specifications: 1600 Gbps of links is 200e9 bytes a second; v4's are told
# by what a pod of 4096 all-reduces, 1.1e15 bytes a second. A host of 8 v5e has
# two network cards of 100 Gbps; the pages of v4 and v5p name none, and 200 Gbps
# for a host's 4 chips is assumed. Memory is from the compiler's refusals of
# programs that do not fit, but of v4, which has 32 GiB by its page.
CHIPS = {
  'v4': Chip('TPU v4', 32 * _GIB, 275e12, 1200e9, 268e9, 6.25e9, 3),
  'v5e': Chip(
    'TPU v5 lite', int(15.75 * _GIB), 197e12, 819e9, 200e9, 3.125e9, 2
  ),
  'v5p': Chip('TPU v5', int(95.74 * _GIB), 459e12, 2765e9, 600e9, 6.25e9, 3),
  'v6e': Chip(
    'TPU v6 lite', int(31.25 * _GIB), 918e12, 1600e9, 400e9, 12.5e9, 2
  ),
}
# libtpu would ask a cloud machine's metadata server what it is, and lock out
# other processes; where there is no TPU it complains of what it does not know.
_QUIET = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_MIN_LOG_LEVEL': '3',
}
_INSTALL = (
  "The TPU compiler is not installed: pip install 'mergejax[tpu]' (it brings "
  'libtpu, which also runs on machines without a TPU).'
)


def chip_of(topology: str) -> Chip:
  """The chip of a topology such as `v5e:16x16`.

  Raises:
    ConfigError: no such chip, or no such form of a name.

  Example:
    >>> chip_of('v5e:4x4').memory / 2**30
    15.75
  """
  name, colon, shape = topology.partition(':')
  if not colon or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise errors.ConfigError(
      f'A topology is a chip and the shape of its slice, v5e:16x16 or '
      f'v5p:4x4x4, not {topology!r}.'
    )
  if name not in CHIPS:
    raise errors.ConfigError(errors.near(name, CHIPS, 'chip'))
  chip = CHIPS[name]
  if shape.count('x') + 1 != chip.dimensions:
    example = 'x'.join(['4'] * chip.dimensions)
    raise errors.ConfigError(
      f'Slices of {name} have {chip.dimensions} dimensions, such as '
      f'{name}:{example}; {topology!r} has {shape.count("x") + 1}.'
    )
  return chip


def devices(topology: str, slices: int = 1) -> Sequence[Any]:
  """Described devices of one or several slices: for `partition.make_mesh`.

  Args:
    topology: of each slice, such as `v5e:16x16`.
    slices: how many, joined by the slower network of the data centre.

  Raises:
    ConfigError: an unknown topology, or the TPU compiler is not installed.
  """
  chip_of(topology)
  errors.check_whole('slices', slices)
  if importlib.util.find_spec('libtpu') is None:
    raise errors.ConfigError(_INSTALL)
  for name, value in _QUIET.items():
    os.environ.setdefault(name, value)
  more: dict[str, Any] = {} if slices == 1 else {'num_slices': slices}
  if topology.startswith('v4:'):
    more['chip_config_name'] = 'megacore'  # a device a chip, not two cores
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **more
    )
  except Exception as error:  # of libtpu, whatever it may be
    raise errors.ConfigError(
      f'The TPU compiler knows no topology {topology!r}: '
      f'{errors.first_line(error)}'
    ) from error
  return found.devices
