# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge did, in numbers and in words."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib

from mergejax.adapters import written
from mergejax.checkpoints.peft import extract
from mergejax.merging.disk import plans


@dataclasses.dataclass(frozen=True)
class Report:
  """What a merge did.

  Attributes:
    out: where the result is.
    computed: how many parameters were merged in this call; the others were
      done before it.
    seconds: wall time of this call.
    phases: seconds reading, computing and writing, over all threads.
    read_bytes: of the sources.
    written_bytes: of the result.
    read_by: bytes that each process asked of the sources, which is more than
      they hold where a method reads them several times.
    residuals: what the factors of a merged LoRA miss of its products.
  """

  out: pathlib.Path
  computed: int
  seconds: float
  phases: Mapping[str, float]
  read_bytes: int
  written_bytes: int
  read_by: Sequence[int] = ()
  residuals: Sequence[extract.Residual] = ()

  def describe(self) -> str:
    """The report in words."""
    if not self.computed:
      return f'{self.out} is complete; nothing was computed.'
    moved = (self.read_bytes + self.written_bytes) / 1e6
    phases = ', '.join(f'{n} {s:.2f} s' for n, s in self.phases.items())
    return (
      (
        f'{self.out}: {self.computed} parameters in {self.seconds:.2f} s, '
        f'{moved / self.seconds:,.0f} MB/s read and written ({phases} over '
        f'{plans.WORKERS} threads)'
      )
      + self._describe_processes()
      + self._describe_residuals()
    )

  def _describe_processes(self):
    if len(self.read_by) < 2:
      return ''
    read = ', '.join(f'{nbytes / 1e6:,.1f}' for nbytes in self.read_by)
    return f'\nby {len(self.read_by)} processes, which read {read} MB'

  def _describe_residuals(self):
    if not self.residuals:
      return ''
    return f'\n{written.describe(self.residuals)}'
