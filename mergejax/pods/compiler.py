# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles work ahead of time and reads off what it needs."""

import collections
from collections.abc import Callable
import re
import time
from typing import Any

import jax
import numpy as np

from mergejax.core import errors
from mergejax.pods import chips
from mergejax.pods import collectives
from mergejax.pods import hlo
from mergejax.pods import operations
from mergejax.pods import report as report_lib
from mergejax.pods import traffic
from mergejax.pods import work as work_lib

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_SIZE = r'([\d.]+)([KMGT]?)'
# What the TPU compiler says of a program that does not fit: what all of it
# takes, or what its temporaries alone do, beside what it is given.
_ALL = re.compile(rf'Used {_SIZE} of {_SIZE} hbm')
_TEMPORARIES = re.compile(
  rf'HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)'
)


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

  Raises:
    ConfigError: the compiler is of another version than JAX, which cannot read
      what it made.
  """
  chip = chips.chip_of(topology) if topology else None
  held = {
    role: size
    for role, tree in work.held.items()
    if (size := work_lib.shard_bytes(tree))
  }
  # Fields of the report.
  figures: dict[str, Any] = collections.defaultdict(int, collectives=[])
  for program in work.programs:
    _add(program, work.mesh, figures)
    if 'used' in figures:
      break
  cost = {name: figures.pop(name, 0.0) for name in ('flops', 'bytes accessed')}
  for name in ('trace_s', 'compile_s', 'compile_cpu_s'):
    figures[name] = round(figures[name], 1)
  figures['collectives'] = collectives.joined(figures['collectives'])
  figures.setdefault('memory', chip and chip.memory)
  return report_lib.Report(
    name=work.name,
    topology=topology or work.mesh.devices.flat[0].platform,
    slices=slices,
    mesh=dict(work.mesh.shape),
    held=held,
    cost_analysis=cost,
    parameters=work.parameters,
    tokens=work.tokens,
    rows=work.rows,
    chip=chip,
    crossing=crossing(work.mesh),
    **figures,
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


def _add(program, mesh, figures):
  """Compiles one program, and adds what it needs: memory at most, else in sum.

  One that the compiler refuses adds `used` and `memory`: what it would need,
  and what there is.
  """
  times, given = program.times, work_lib.shard_bytes(program.arguments)
  started = time.perf_counter()
  traced = program.fn.trace(*program.arguments)
  total = times * operations.of_jaxpr(traced.jaxpr)
  figures['operations'] += total / mesh.size
  lowered = traced.lower()
  figures['trace_s'] += time.perf_counter() - started
  started, before = time.perf_counter(), time.process_time()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    refusal = _refusal(str(error), given)
    if refusal is None:
      raise
    figures['used'], figures['memory'] = refusal
    return
  finally:
    figures['compile_s'] += time.perf_counter() - started
    figures['compile_cpu_s'] += time.process_time() - before
  memory = compiled.memory_analysis()
  padding = max(memory.argument_size_in_bytes - given, 0)
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  figures['padding'] += times * padding
  figures['outputs'] += times * outputs
  for name, size in (
    ('temporaries', memory.temp_size_in_bytes),
    ('code', memory.generated_code_size_in_bytes),
  ):
    figures[name] = max(figures[name], size)
  cost = compiled.cost_analysis() or {}
  for name in ('flops', 'bytes accessed'):
    figures[name] += times * cost.get(name, 0.0)
  text = hlo.Program(_text(compiled))
  figures['traffic'] += times * traffic.found(text)
  sent = collectives.found(text, mesh)
  figures['collectives'] += [each.repeated(times) for each in sent]


def _text(compiled):
  """What was compiled; a newer compiler's is not always readable.

  Raises:
    ConfigError: it is not.
  """
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise errors.ConfigError(
      'This JAX compiled the program and cannot read the result: '
      f'{errors.first_line(error)}. Its compiler is of another version: '
      "install the libtpu that JAX names, pip install 'mergejax[tpu]'."
    ) from error


def _refusal(message, given):
  """`(bytes needed, bytes there are)` of a refusal to compile, or None."""
  whole, part = _ALL.search(message), _TEMPORARIES.search(message)
  found = whole or part
  if found is None:
    return None
  size = lambda i: int(float(found[i]) * _UNITS[found[i + 1]])
  return size(1) + (0 if whole else given), size(3)
