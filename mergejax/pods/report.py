# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a compiled program needs of a chip: memory, time, network; as a table."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from mergejax.pods import chips
from mergejax.pods import collectives as collectives_lib

_AXES_APART = ' and '


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Figures of one chip, for one call of what was compiled.

  Attributes:
    name: what was compiled.
    topology: for which slice, or the platform of the devices.
    slices: how many of these.
    mesh: sizes of its axes.
    held: `{role: bytes}` of what lies there all the time: parameters,
      optimizer, batch.
    padding: bytes more that arguments take as the compiler lays them out.
    outputs: bytes of results that do not take the place of an argument.
    temporaries: bytes of activations and of all else that comes and goes.
    code: bytes of the program itself.
    memory: bytes of the chip's memory; None if the chip is not known.
    used: bytes that the compiler says it would need, where it refused: the
      program does not fit, and nothing below is known.
    collectives: what is sent, see `collectives`.
    operations: of products, loops and recomputation included: a chip's even
      share, see `operations`; what chips repeat counts once.
    cost_analysis: XLA's own count, which takes the body of a loop once.
    traffic: bytes read from and written to main memory, see `traffic`.
    parameters: numbers of one model, on all devices together.
    tokens: positions of a batch, of all devices together.
    rows: of a batch.
    trace_s: seconds of tracing.
    compile_s: seconds of compiling.
    compile_cpu_s: seconds of a processor's work in that: what a busy machine
      does not change.
    chip: its peaks; None if it is not known.
    crossing: mesh axes that cross slices.
    largest_batch: the most rows that fit, by a line through two compilations,
      see `compiler.largest_rows`; None if nobody asked.
    second_rows: rows of the second of these.
  """

  name: str
  topology: str
  slices: int = 1
  mesh: Mapping[str, int]
  held: Mapping[str, int]
  padding: int = 0
  outputs: int = 0
  temporaries: int = 0
  code: int = 0
  memory: int | None = None
  used: int | None = None
  collectives: Sequence[collectives_lib.Collective] = ()
  operations: float = 0
  cost_analysis: Mapping[str, float] = dataclasses.field(default_factory=dict)
  traffic: int = 0
  parameters: int = 0
  tokens: int = 0
  rows: int = 0
  trace_s: float = 0
  compile_s: float = 0
  compile_cpu_s: float = 0
  chip: chips.Chip | None = None
  crossing: tuple[str, ...] = ()
  largest_batch: int | None = None
  second_rows: int | None = None

  @property
  def devices(self) -> int:
    """Chips of all slices."""
    return math.prod(self.mesh.values())

  @property
  def total(self) -> int:
    """Bytes that one chip must have."""
    if self.used is not None:
      return self.used
    held = sum(self.held.values()) + self.padding
    return held + self.outputs + self.temporaries + self.code

  @property
  def fits(self) -> bool | None:
    """Whether it fits; None if the chip is not known."""
    if self.used is not None:
      return False
    return None if self.memory is None else self.total <= self.memory

  @property
  def six_n_d(self) -> float:
    """6 N D over the devices: N parameters, D positions of a batch."""
    return 6 * self.parameters * self.tokens / self.devices

  @property
  def seconds(self) -> dict[str, float]:
    """Least seconds by compute, memory and network; the largest one holds.

    Each is a share of the chip's peak: products at its bfloat16 rate, bytes of
    main memory at its bandwidth, bytes that are sent at that of all its links
    together. A step takes at least the largest, and at most their sum if
    nothing overlaps and peaks are reached.
    """
    if self.chip is None or self.used is not None:
      return {}
    sent = {True: 0.0, False: 0.0}
    for each in self.collectives:
      sent[each.between] += each.sent_bytes
    found = {
      'compute': self.operations / self.chip.flops,
      'memory': self.traffic / self.chip.memory_bandwidth,
      'network': sent[False] / self.chip.ici,
    }
    if self.slices > 1:
      found['network between slices'] = sent[True] / self.chip.dcn
    return found

  @property
  def bound(self) -> str | None:
    """What takes longest."""
    seconds = self.seconds
    return max(seconds, key=lambda name: seconds[name]) if seconds else None

  def crosses(self, axis: str) -> list[collectives_lib.Collective]:
    """The collectives whose groups span an axis of the mesh."""
    return [each for each in self.collectives if axis in each.axes]

  def with_largest(self, rows: int, second_rows: int) -> 'Report':
    """The same, with the largest batch and what it was found by."""
    return dataclasses.replace(
      self, largest_batch=rows, second_rows=second_rows
    )

  def to_json(self) -> dict[str, Any]:
    """All figures as plain data."""
    found = dataclasses.asdict(self)
    return {
      **found,
      'devices': self.devices,
      'total': self.total,
      'fits': self.fits,
      'six_n_d': self.six_n_d,
      'seconds': self.seconds,
      'bound': self.bound,
    }

  def to_text(self) -> str:
    """The figures for a terminal."""
    sizes = ', '.join(f'{n} {s}' for n, s in self.mesh.items() if s > 1)
    slices = '' if self.slices == 1 else f'{self.slices} slices of '
    lines = [
      f'{self.name} on {slices}{self.topology}: {self.devices} devices '
      f'({sizes or "one"})',
      '',
      *self._memory_lines(),
      '',
    ]
    if self.used is None:
      lines += [*self._collective_lines(), '', *self._time_lines()]
    if self.largest_batch is not None:
      lines.append(
        f'{"largest batch":<22}{self.largest_batch:>10} rows, by the straight '
        f'line through {self.rows} and {self.second_rows} rows'
      )
    lines.append(
      f'{"compiling":<22}{self.compile_s:10.1f} s '
      f'({self.compile_cpu_s:.1f} s of a processor), tracing '
      f'{self.trace_s:.1f} s'
    )
    return '\n'.join(lines)

  def _memory_lines(self):
    rows = {
      **self.held,
      'padding': self.padding,
      'results': self.outputs,
      'temporaries': self.temporaries,
      'program': self.code,
    }
    if self.used is not None:
      rows = dict(self.held)
    lines = [f'{n:<22}{_size(size):>14} a chip' for n, size in rows.items()]
    verdict = ''
    if self.memory is not None:
      words = 'fits' if self.fits else 'DOES NOT FIT'
      share = self.total / self.memory
      verdict = f' of {_size(self.memory)}, {share:.0%}: {words}'
    return [*lines, f'{"all":<22}{_size(self.total):>14} a chip{verdict}']

  def _collective_lines(self):
    if not self.collectives:
      return ['no collectives']
    lines = [
      f'{"collective":<20}{"mesh axes":<18}{"count":>8}{"given":>14}'
      f'{"sent":>14}{"largest":>14}  in'
    ]
    for each in self.collectives:
      axes = _AXES_APART.join(each.axes) or 'none'
      axes += ', slices' * each.between
      lines.append(
        f'{each.kind:<20}{axes:<18}{each.count:>8}'
        f'{_size(each.given_bytes):>14}{_size(each.sent_bytes):>14}'
        f'{_size(each.largest):>14}  {each.source}'
      )
    return lines

  def _time_lines(self):
    counted = self.cost_analysis.get('flops', 0.0)
    lines = [
      f'{"operations":<22}{self.operations:10.3e} a chip; 6 N D '
      f'{self.six_n_d:.3e}, XLA (loops once) {counted:.3e}',
      f'{"main memory":<22}{_size(self.traffic):>14} a chip read and written',
    ]
    for name, seconds in self.seconds.items():
      mark = '  <- holds' if name == self.bound else ''
      lines.append(f'{name:<22}{1e3 * seconds:10.2f} ms at peak{mark}')
    return lines


def _size(count: float) -> str:
  """Bytes for people: 1536 is 1.5 KiB."""
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024 or unit == 'GiB':
      return f'{count:,.0f} B' if unit == 'B' else f'{count:,.2f} {unit}'
    count /= 1024
  raise AssertionError
