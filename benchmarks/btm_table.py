# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of `btm.py`, from its rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import btm_forest
import numpy as np
import real_data

Row = Mapping[str, Any]
COUNTS = (2, 4, 8, 12)
# At equal compute: all begin as the seed.
MAIN = (
  'seed', 'each expert on its own', 'dense', 'ensemble',
  'ensemble, prior learnt on the way', 'ensemble, uniform prior',
  'random parts, ensemble', 'random parts, ensemble, uniform prior',
  'random parts, uniform average', 'uniform average', 'posterior average',
  'best merge',
)  # fmt: skip
OF_FOUR = (
  'dense', 'dense, more steps', 'DiLoCo', 'ensemble', 'uniform average',
  'uniform average, trained on', 'mix, not trained', 'mix, trained on',
)  # fmt: skip
OF_EIGHT = (
  'dense', 'ensemble', 'clusters, ensemble', 'domains, routed',
  'clusters, routed',
)  # fmt: skip
OF_TWELVE = ('dense', 'ensemble', 'ensemble, new from averages')
NEW = (
  'new: seed', 'new: average', 'new: expert from the seed',
  'new: expert from the average',
)  # fmt: skip


class Found:
  """Means over domains, by seed."""

  def __init__(self, rows: Sequence[Row]):
    self._bits = {
      (row['arm'], int(row['task']), row['seed']): row['bits'] for row in rows
    }
    self.seeds = sorted({row['seed'] for row in rows})

  def arms(self, prefix: str, count: int) -> list[str]:
    """Names of arms with K experts that begin so, in order of length."""
    known = {a for a, k, _ in self._bits if k == count and a.startswith(prefix)}
    return sorted(known, key=lambda name: (len(name), name))

  def means(
    self, arm: str, count: int, domains: Sequence[str]
  ) -> dict[int, float]:
    """`{seed: mean}` of the seeds that have all of the domains."""
    found = {}
    for seed in self.seeds:
      bits = self._bits.get((arm, count, seed), {})
      if domains and all(domain in bits for domain in domains):
        found[seed] = float(np.mean([bits[domain] for domain in domains]))
    return found


def table(
  found: Found, arms: Sequence[str], counts: Sequence[int], to: str = ''
) -> Iterator[str]:
  """Lines of a Markdown table of means over domains inside and left out.

  Args:
    found: what there is.
    arms: rows of the table; those of which nothing is there are left out.
    counts: each K has two columns.
    to: with a name, differences to that arm, seed by seed.
  """
  heads = [f'K = {k}, {side}' for k in counts for side in ('own', 'left out')]
  yield f'| {f"above {to}" if to else "bits per byte"} | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for arm in arms:
    cells = []
    for count in counts:
      for domains in btm_forest.domains_of(count):
        values = found.means(arm, count, domains)
        if to:
          base = found.means(to, count, domains)
          values = {s: v - base[s] for s, v in values.items() if s in base}
        cells.append(
          real_data.interval(list(values.values())) if values else ''
        )
    if any(cells) and arm != to:
      yield f'| {arm} | {" | ".join(cells)} |'


def _new(found: Found) -> Iterator[str]:
  """New domains, one by one: before and after training."""
  heads = [*btm_forest.NEW, 'mean']
  yield f'| bits per byte | {" | ".join(heads)} |'
  yield '|---' * (len(heads) + 1) + '|'
  for arm in NEW:
    groups = [*([domain] for domain in btm_forest.NEW), btm_forest.NEW]
    cells = [list(found.means(arm, 12, each).values()) for each in groups]
    if any(cells):
      told = ' | '.join(real_data.interval(c) if c else '' for c in cells)
      yield f'| {arm.removeprefix("new: ")} | {told} |'


def _chosen(rows: Sequence[Row]) -> Iterator[str]:
  """Which merge was best, by seed."""
  for count in COUNTS:
    mine = [
      row
      for row in rows
      if row['arm'] == 'best merge' and row['task'] == str(count)
    ]
    names = ', '.join(
      row['chosen'] for row in sorted(mine, key=lambda r: r['seed'])
    )
    if names:
      yield f'- K = {count}: {names}'


def _settings(seed_steps: int, steps: int, seeds: int) -> list[str]:
  return [
    f'{real_data.machine()}. {seeds} seed(s); `+-` is half of a 95% t interval '
    'over them. Bits per byte of test text, the mean over domains; lower is '
    'better.',
    '',
    f'A model of 0.66 million parameters; the seed has {seed_steps} steps of '
    f'{btm_forest.BATCH} rows on {btm_forest.SEEN} domains, an expert {steps} '
    'more on its own. `dense` goes on with the K domains: as many steps, K times '
    'the rows, so that all have the same tokens. Own domains are the first K of: '
    f'{", ".join(btm_forest.ORDER[:12])}. Left out are those that no model has '
    'seen: five up to K = 8, one at K = 12. Of these too, cached priors and '
    'posterior averages are of validation text of the domain.',
  ]


def write(rows: Sequence[Row], name: str, seed_steps: int, steps: int) -> None:
  """Writes the tables, and prints them."""
  found = Found(rows)
  diloco = found.arms('DiLoCo', 4)
  four = [a for arm in OF_FOUR for a in (diloco if arm == 'DiLoCo' else [arm])]
  lines = [*_settings(seed_steps, steps, len(found.seeds)), '']
  lines += ['## All begin as the seed', '', *table(found, MAIN, COUNTS), '']
  lines += [*table(found, MAIN, COUNTS, to='dense'), '']
  lines += ['The best merge on validation text, by seed:', '', *_chosen(rows)]
  lines += ['', '## New domains: branched from an average', '']
  lines += [
    'Averages are of eight experts, weighted by validation text of the new '
    'domain: what begins as one has their steps behind it too.',
    '',
    *_new(found),
  ]
  lines += ['', *table(found, OF_TWELVE, [12]), '', '## Clusters', '']
  lines += ['Routed: by the first 32 tokens to two experts.', '']
  lines += [*table(found, OF_EIGHT, [8]), '']
  lines += ['## Four domains: merged while they train, mixed, trained on', '']
  lines += [
    f'What is trained on has {steps} steps of {btm_forest.BATCH} rows more than '
    'the others.',
    '',
  ]
  lines += [*table(found, four, [4]), '', *table(found, four, [4], to='dense')]
  text = '\n'.join(lines) + '\n'
  (real_data.RESULTS / name).write_text(text)
  print(text)
