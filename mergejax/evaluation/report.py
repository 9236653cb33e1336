# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a table of Branch-Train-Merge says: what held, and plain advice."""

from collections.abc import Mapping, Sequence
import dataclasses

from mergejax.evaluation import base


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


def expectations(table: base.Table, roles: Roles) -> dict[str, bool]:
  """Which of the results that the method promises held on this run."""
  # Equal experts, as those that were merged last, are not the best of all.
  at_home = all(
    table[row][domain].value < table[other][domain].value
    for domain, row in roles.experts.items()
    for other in roles.experts.values()
    if other != row
  )
  return {
    'each expert is the best expert on its own domain': at_home,
    'the ensemble beats the seed and the compute-matched dense model on the '
    'mean': table.mean(roles.ensemble)
    < min(table.mean(roles.seed), table.mean(roles.dense)),
    'the best weight merge beats the seed on the mean': (
      table.mean(roles.best_merge) < table.mean(roles.seed)
    ),
  }


def advice(table: base.Table, roles: Roles) -> list[str]:
  """Which model to use for what, read from the table."""
  single = [roles.seed, roles.dense, *roles.merges]
  best_single = min(single, key=lambda row: table.mean(row))
  lines = []
  for domain in roles.experts:
    candidates = [*roles.experts.values(), *single]
    best = min(candidates, key=lambda r: table[r][domain].value)
    lines.append(
      f'{domain}: {best} ({table[best][domain].value:.3f} bits per byte)'
    )
  lines.append(
    f'text of any domain, one model: {best_single} '
    f'({table.mean(best_single):.3f})'
  )
  lines.append(
    f'text of any domain, without joint training: {roles.best_merge} '
    f'({table.mean(roles.best_merge):.3f})'
  )
  lines.append(
    f'text of any domain, {len(roles.experts)} models in memory: '
    f'{roles.ensemble} ({table.mean(roles.ensemble):.3f})'
  )
  return lines
