# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests tell XLA, in their own process and in those they start."""


def flags(count: int) -> str:
  """`XLA_FLAGS` of a process with `count` fake devices.

  Most of the time of the tests goes into compiling tiny programs, and LLVM's
  optimizations are most of that: without them, random numbers of twenty shapes
  compile in a quarter of the time, a train step in half.

  >>> flags(2).split()[0]
  '--xla_force_host_platform_device_count=2'
  """
  return (
    f'--xla_force_host_platform_device_count={count}'
    ' --xla_backend_optimization_level=0'
  )
