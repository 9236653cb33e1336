# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a forest notes of its experts, and what it tells people of them."""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any

from mergejax.core import errors
from mergejax.experts import ensemble

# The parent of an expert that branched from the seed.
SEED = 'seed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
  """One expert of a forest.

  Attributes:
    domain: what it was trained on.
    parents: `{expert or 'seed': weight}` of the average that it began as; empty
      if that is not known.
    branched_by: how the weights came about: 'seed', 'uniform', 'posterior',
      ...; and the merge method, if it was another than the mean.
    steps: updates of its own.
    data: of its training text, as plain data: bytes, tokens, epochs.
    fingerprint: of its weights, see `statistics.saved.fingerprint`.
    statistics: names of the statistics that lie beside it.
  """

  domain: str
  parents: Mapping[str, float] = dataclasses.field(default_factory=dict)
  branched_by: str = SEED
  steps: int | None = None
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fingerprint: str = ''
  statistics: Sequence[str] = ()

  def __post_init__(self):
    if self.steps is not None:
      errors.check_whole('steps', self.steps, least=0)
    for name, weight in self.parents.items():
      errors.check_number(f'The weight of the parent {name}', weight, 0)
    total = sum(self.parents.values())
    if self.parents and abs(total - 1) > 1e-4:
      raise errors.ConfigError(
        f'The weights of the parents {dict(self.parents)} sum to {total:g}, '
        'not to 1.'
      )

  def to_json(self) -> dict[str, Any]:
    """The record as plain data."""
    return {
      **dataclasses.asdict(self),
      'parents': dict(self.parents),
      'data': dict(self.data),
      'statistics': list(self.statistics),
    }


def from_json(record: Any, told: str) -> Expert:
  """The record of what `to_json` gave.

  Args:
    record: from a file.
    told: where it is from, for messages.

  Raises:
    CheckpointError: it has no domain, or what no record has.
  """
  known = [field.name for field in dataclasses.fields(Expert)]
  given = record if isinstance(record, Mapping) else {}
  other = [word for word in given if word not in known]
  if other or 'domain' not in given:
    wrong = f'says {other[0]!r}' if other else 'has no domain'
    raise errors.CheckpointError(
      f'{told}: the record {wrong}. It tells {", ".join(known)}, of which the '
      'domain must be there.'
    )
  return Expert(**given)


def check_name(name: str) -> None:
  """Raises a `ConfigError` for what cannot be the name of an expert."""
  # These say of what an average is, where the name of an expert may stand too.
  taken = (SEED, *ensemble.AVERAGES)
  if not re.fullmatch(r'\w[\w.-]*', name) or name in taken:
    raise errors.ConfigError(
      'An expert is named by letters, digits, _ . and -, and not '
      f'{", ".join(taken)}: {name!r} will not do.'
    )


def descendants(experts: Mapping[str, Expert], name: str) -> list[str]:
  """The experts that hold an influence of one, through however many branches.

  Args:
    experts: of a forest, by name.
    name: of one of them, or of one that was removed.

  Example:
    >>> a = Expert(domain='a', parents={'seed': 1.0})
    >>> b = Expert(domain='b', parents={'a': 0.5, 'seed': 0.5})
    >>> descendants({'a': a, 'b': b}, 'a')
    ['b']
  """
  reached = {name}
  found = [name]
  for one in found:
    for child, expert in experts.items():
      if child not in reached and expert.parents.get(one, 0) > 0:
        reached.add(child)
        found.append(child)
  return sorted(found[1:], key=list(experts).index)


def from_seed(experts: Mapping[str, Expert], name: str) -> bool:
  """Whether all that an expert began as is known to come from the seed.

  A parent that was removed since does not tell where it came from.
  """
  waiting, seen = [name], set()
  while waiting:
    one = waiting.pop()
    if one == SEED or one in seen:
      continue
    seen.add(one)
    if one not in experts or not experts[one].parents:
      return False
    waiting += experts[one].parents
  return True


def card(name: str, expert: Expert, model: Mapping[str, Any]) -> str:
  """The model card of an expert, Markdown.

  Args:
    name: of the expert.
    expert: its record.
    model: configuration of its architecture.
  """
  parents = ', '.join(f'{w:.3g} {p}' for p, w in expert.parents.items())
  sizes = ', '.join(f'{key} {value}' for key, value in model.items())
  rows = {
    'domain': expert.domain,
    'began as': f'{parents} ({expert.branched_by})' if parents else 'not known',
    'steps of its own': 'not known' if expert.steps is None else expert.steps,
    'training text': ', '.join(f'{v} {k}' for k, v in expert.data.items()),
    'statistics': ', '.join(expert.statistics),
    'fingerprint': expert.fingerprint,
    'architecture': sizes,
  }
  lines = [f'- {what}: {value}' for what, value in rows.items() if value != '']
  return '\n'.join([
    f'# Expert {name}',
    '',
    'A language model of an expert forest, trained on one domain '
    '(Branch-Train-Merge, https://arxiv.org/abs/2208.03306). What it began as '
    'is in it: removing a parent from the forest does not undo that.',
    '',
    *lines,
    '',
    '    module, params = mergejax.load_model("model")',
    '',
  ])  # fmt: skip
