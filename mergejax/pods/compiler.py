# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles work ahead of time and reads off what it needs."""

from collections.abc import Callable
import dataclasses
import re
import time

import jax
import numpy as np

from mergejax.pods import chips
from mergejax.pods import collectives
from mergejax.pods import hlo
from mergejax.pods import operations
from mergejax.pods import report as report_lib
from mergejax.pods import traffic
from mergejax.pods import work as work_lib

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30}
_REFUSED = re.compile(r'Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm')


@dataclasses.dataclass
class _Figures:
  """What programs need together: memory at most, all else in sum."""

  padding: int = 0
  outputs: int = 0
  temporaries: int = 0
  code: int = 0
  operations: int = 0
  traffic: int = 0
  flops: float = 0
  accessed: float = 0
  trace_s: float = 0
  compile_s: float = 0
  refused: tuple[int, int] | None = None
  sent: list[collectives.Collective] = dataclasses.field(default_factory=list)


def report(
  work: work_lib.Work, *, topology: str = '', slices: int = 1
) -> report_lib.Report:
  """Compiles what a piece of work consists of, for its mesh.

  Args:
    work: see `work`.
    topology: what the mesh is described by; by default the platform of its
      devices, whose peaks are not known.
    slices: how many of these there are.

  Returns:
    A report. Where the compiler refuses a program because it does not fit, it
    says how much that would have used.
  """
  chip = chips.chip_of(topology) if topology else None
  held = {
    role: size
    for role, tree in work.held.items()
    if (size := work_lib.shard_bytes(tree))
  }
  sums = _Figures()
  for program in work.programs:
    _add(program, work.mesh, sums)
    if sums.refused:
      break
  used, memory = sums.refused or (None, chip and chip.memory)
  return report_lib.Report(
    name=work.name,
    topology=topology or work.mesh.devices.flat[0].platform,
    slices=slices,
    mesh=dict(work.mesh.shape),
    held=held,
    padding=sums.padding,
    outputs=sums.outputs,
    temporaries=sums.temporaries,
    code=sums.code,
    memory=memory,
    used=used,
    collectives=collectives.joined(sums.sent),
    operations=sums.operations / work.mesh.size,
    cost_analysis={'flops': sums.flops, 'bytes accessed': sums.accessed},
    traffic=sums.traffic,
    parameters=work.parameters,
    tokens=work.tokens,
    rows=work.rows,
    trace_s=round(sums.trace_s, 1),
    compile_s=round(sums.compile_s, 1),
    chip=chip,
    crossing=crossing(work.mesh),
  )


def largest_rows(
  first: report_lib.Report,
  make: Callable[[int], report_lib.Report],
  slices: int,
) -> tuple[int, report_lib.Report]:
  """The most rows that fit, by a straight line through two compilations.

  Arguments, activations and what else depends on the rows grow with them; all
  else stays. The second compilation has half the rows, or twice as many where
  half do not divide. The line is not checked by a third.

  Args:
    first: of some number of rows.
    make: `rows -> report`.
    slices: the number of rows must be a multiple of it.

  Returns:
    `(rows, the second report)`; 0 rows if not even one a slice fits.
  """
  rows = first.rows // 2 if first.rows % (2 * slices) == 0 else 2 * first.rows
  second = make(rows)
  by_row = (first.total - second.total) / (first.rows - second.rows)
  memory = first.memory or 0
  if by_row <= 0:
    return first.rows if first.fits else 0, second
  most = first.rows + (memory - first.total) / by_row
  return max(int(most // slices) * slices, 0), second


def crossing(mesh: jax.sharding.Mesh) -> tuple[str, ...]:
  """The axes of a mesh along which devices are of several slices."""
  number = np.vectorize(lambda d: getattr(d, 'slice_index', 0), otypes=[int])
  numbers = number(mesh.devices)
  return tuple(
    name
    for i, name in enumerate(mesh.axis_names)
    if (numbers != numbers.take([0], axis=i)).any()
  )


def _add(program, mesh, sums):
  """Compiles one program, and adds what it needs."""
  started = time.perf_counter()
  traced = program.fn.trace(*program.arguments)
  times = program.times
  sums.operations += times * operations.of_jaxpr(traced.jaxpr)
  lowered = traced.lower()
  sums.trace_s += time.perf_counter() - started
  started = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found = _REFUSED.search(str(error))
    if not found:
      raise
    size = lambda i: int(float(found[i]) * _UNITS[found[i + 1]])
    sums.refused = size(1), size(3)
    return
  finally:
    sums.compile_s += time.perf_counter() - started
  memory = compiled.memory_analysis()
  given = work_lib.shard_bytes(program.arguments)
  padding = max(memory.argument_size_in_bytes - given, 0)
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  sums.padding += times * padding
  sums.outputs += times * outputs
  sums.temporaries = max(sums.temporaries, memory.temp_size_in_bytes)
  sums.code = max(sums.code, memory.generated_code_size_in_bytes)
  cost = compiled.cost_analysis() or {}
  sums.flops += times * cost.get('flops', 0.0)
  sums.accessed += times * cost.get('bytes accessed', 0.0)
  text = hlo.Program(compiled.as_text())
  sums.traffic += times * traffic.found(text)
  sums.sent += [each.repeated(times) for each in collectives.found(text, mesh)]
