# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A table of models by domains: Markdown, JSON, and plain advice."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from mergejax.evaluation import bits
from mergejax.evaluation import scores as scores_lib

# {model: {domain: Score}}, models in the order of the table.
Table = Mapping[str, Mapping[str, bits.Score]]


def mean(scores: Mapping[str, bits.Score]) -> float:
  """Unweighted mean of a model's bits per byte over the domains."""
  return float(np.mean([s.bits_per_byte for s in scores.values()]))


def to_json(table: Table) -> dict:
  """The table as plain numbers."""
  return {
    model: {
      'mean': mean(scores),
      'domains': {d: dataclasses.asdict(s) for d, s in scores.items()},
    }
    for model, scores in table.items()
  }


def to_markdown(table: Table) -> str:
  """The table in Markdown; the best of each column is bold."""
  domains = list(next(iter(table.values())))
  best = {
    d: min(scores[d].bits_per_byte for scores in table.values())
    for d in domains
  }
  best_mean = min(mean(scores) for scores in table.values())
  bold = lambda text, on: f'**{text}**' if on else text
  lines = [
    '| model | ' + ' | '.join(domains) + ' | mean |',
    '|---' * (len(domains) + 2) + '|',
  ]
  for model, scores in table.items():
    cells = []
    for d in domains:
      s = scores[d]
      text = f'{s.bits_per_byte:.3f} ({s.low:.3f}-{s.high:.3f})'
      cells.append(bold(text, s.bits_per_byte == best[d]))
    average = mean(scores)
    cells.append(bold(f'{average:.3f}', average == best_mean))
    lines.append(f'| {model} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def to_text(table: Table) -> str:
  """The table for a terminal, without intervals."""
  rows = {
    model: {**{d: s.bits_per_byte for d, s in own.items()}, 'mean': mean(own)}
    for model, own in table.items()
  }
  return scores_lib.to_text(rows)


@dataclasses.dataclass(frozen=True)
class Roles:
  """Which rows of a table play which part in Branch-Train-Merge.

  Attributes:
    seed: the seed model.
    dense: the dense model trained with the same total compute.
    ensemble: the output ensemble.
    experts: `{domain: row}` of the expert trained on each domain.
    merges: rows that are one model made by a weight merge.
    best_merge: the merge chosen on validation.
  """

  seed: str
  dense: str
  ensemble: str
  experts: Mapping[str, str]
  merges: Sequence[str]
  best_merge: str


def expectations(table: Table, roles: Roles) -> dict[str, bool]:
  """Which of the results that the method promises held on this run."""
  own = all(
    table[row][domain].bits_per_byte
    == min(table[r][domain].bits_per_byte for r in roles.experts.values())
    for domain, row in roles.experts.items()
  )
  of = lambda row: mean(table[row])
  return {
    'each expert is the best expert on its own domain': own,
    'the ensemble beats the seed and the compute-matched dense model on the '
    'mean': of(roles.ensemble) < min(of(roles.seed), of(roles.dense)),
    'the best weight merge beats the seed on the mean': (
      of(roles.best_merge) < of(roles.seed)
    ),
  }


def advice(table: Table, roles: Roles) -> list[str]:
  """Which model to use for what, read from the table."""
  single = [roles.seed, roles.dense, *roles.merges]
  best_single = min(single, key=lambda row: mean(table[row]))
  lines = []
  for domain in roles.experts:
    candidates = [*roles.experts.values(), *single]
    best = min(candidates, key=lambda r: table[r][domain].bits_per_byte)
    lines.append(
      f'{domain}: {best} ({table[best][domain].bits_per_byte:.3f} bits per '
      'byte)'
    )
  lines.append(
    f'text of any domain, one model: {best_single} '
    f'({mean(table[best_single]):.3f})'
  )
  lines.append(
    f'text of any domain, without joint training: {roles.best_merge} '
    f'({mean(table[roles.best_merge]):.3f})'
  )
  lines.append(
    f'text of any domain, {len(roles.experts)} models in memory: '
    f'{roles.ensemble} ({mean(table[roles.ensemble]):.3f})'
  )
  return lines
