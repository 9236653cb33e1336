# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What averaging costs where eight experts train side by side.

Eight language models on eight fake CPU devices, one a branch of the mesh. Sides:
plain steps, steps with EMA or LAWA inside, and experts that are merged every 100
steps, as local SGD and as DiLoCo. In every round each side makes one step, and
those that merge make a merge behind it, so that ordinary steps and merges
alternate; medians are quoted. Claims: averages in the step cost at most 3% of
it, and merges every 100 steps at most 1% of the time.

Besides the time on the clock the time of all cores is told, which other programs
on the machine disturb less; a real mesh has a network, which is not here. The
last line is JSON. `step_transforms.py` measures averages on one device.

Usage:
  python benchmarks/averaging_cost.py [--rounds 15] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import time

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ['JAX_PLATFORMS'] = 'cpu'

import corpora_lm  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import train_step  # noqa: E402

from mergejax import partition  # noqa: E402
from mergejax import training  # noqa: E402
from mergejax.experts import branch  # noqa: E402
from mergejax.experts import outer  # noqa: E402

EXPERTS = 8
EVERY = 100
SIDES = {
  'plain': {},
  'ema': {'transforms': (training.ema(0.999),)},
  'lawa': {'transforms': (training.lawa(EVERY, 4),)},
  'local_sgd': {'outer': outer.local_sgd(EVERY)},
  'diloco': {'outer': outer.diloco(EVERY)},
}


class Side:
  """Experts that train in one way, and the time of their steps and merges."""

  def __init__(self, **settings):
    trainer = branch.BranchTrainer(
      corpora_lm.module(),
      training.optim.adafactor(0.01),
      experts=[str(i) for i in range(EXPERTS)],
      mesh=partition.make_mesh(branch=EXPERTS, data=1),
      **settings,
    )
    made = trainer.step(1)
    layout = trainer.layout(made)
    step = trainer.compile(made, layout)
    merges = 'outer' in settings
    self._step = step.ordinary if merges else step
    self._merge = step.merge if merges else None
    self._state = trainer.init(made, layout, jax.random.key(0))
    self._batch = trainer.placer()(_batch())
    self.steps, self.merges = [], []

  def round(self, keep: bool) -> None:
    """One step and, where experts are merged, a merge."""

    def step():
      self._state, _ = self._step(self._state, self._batch)

    def merge():
      self._state = self._merge(self._state)

    took = self._timed(step)
    if keep:
      self.steps.append(took)
    if self._merge is not None:
      took = self._timed(merge)
      if keep:
        self.merges.append(took)

  def _timed(self, call):
    """`(wall, cores)` seconds."""
    wall, cores = time.perf_counter(), time.process_time()
    call()
    jax.block_until_ready(self._state)
    return time.perf_counter() - wall, time.process_time() - cores


def _batch():
  """Random tokens of every expert, `<int32>[experts, rows, length]`."""
  shape = EXPERTS, corpora_lm.BATCH, corpora_lm.LENGTH
  tokens = np.random.default_rng(0).integers(3, corpora_lm.PIECES, shape)
  tokens = tokens.astype(np.int32)
  return {'decoder_input_tokens': tokens, 'decoder_target_tokens': tokens}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
  """`{side: {what: [of the clock, of the cores]}}`, in seconds and shares."""
  sides = {name: Side(**settings) for name, settings in SIDES.items()}
  for i in range(rounds + 2):
    for side in sides.values():
      side.round(keep=i >= 2)  # compiled and warm
  plain = np.array(sides['plain'].steps)
  result = {}
  for name, side in sides.items():
    step = np.median(side.steps, axis=0)
    ratio = np.median(np.array(side.steps) / plain, axis=0)
    found = {'step_s': step, 'step_over_plain': ratio}
    if side.merges:
      merge = np.median(side.merges, axis=0)
      found |= {
        'merge_s': merge,
        'merge_over_step': merge / step,
        'share_of_time': merge / (EVERY * step + merge),
      }
    result[name] = {
      what: [round(float(x), 5) for x in own] for what, own in found.items()
    }
  return result


def table(result) -> str:
  """Markdown: every number on the clock and, in brackets, of the cores."""
  heads = (
    'ms a step', 'over a plain step', 'ms a merge', 'steps a merge costs',
    f'share of the time, merged every {EVERY} steps',
  )  # fmt: skip
  forms = ('step_s', 'step_over_plain', 'merge_s', 'merge_over_step')
  lines = [f'| side | {" | ".join(heads)} |', '|---' * (len(heads) + 1) + '|']
  for name, own in result.items():
    cells = []
    for form in forms:
      values = own.get(form)
      scale, digits = (1000, 1) if form.endswith('_s') else (1, 3)
      cells.append(
        '' if values is None else
        '{:.{d}f} ({:.{d}f})'.format(*(scale * x for x in values), d=digits)
      )  # fmt: skip
    share = own.get('share_of_time')
    cells.append('' if share is None else '{:.2%} ({:.2%})'.format(*share))
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  sides = measure(options.rounds)
  print(table(sides))
  result = {
    'machine': train_step.machine(), 'devices': jax.device_count(),
    'experts': EXPERTS, 'merged_every': EVERY, 'rounds': options.rounds,
    'sides': sides,
  }  # fmt: skip
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
