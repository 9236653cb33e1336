# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which parameter of a checkpoint goes where in a model: rules over names."""

from collections.abc import Collection, Sequence
import re

from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

# `(regular expression over the model's names, the checkpoint's name or None)`.
Rules = Sequence[tuple[str, str | None]]


def check_rules(rules: Rules) -> None:
  """Raises a `ConfigError` for what is no list of pairs, such as one pair."""
  for rule in rules:
    match rule:
      case (str(), str() | None):
        continue
    raise errors.ConfigError(
      'Restore rules are a list of pairs, [(NAME, STORED NAME or None), ...], '
      f'not {rules!r}: {rule!r} is no such pair.'
    )


def assign(
  wanted: Collection[typing.Path],
  stored: Collection[typing.Path],
  rules: Rules = (),
  *,
  fallback_to_scratch: bool = False,
  name: str = 'the checkpoint',
) -> dict[typing.Path, typing.Path | None]:
  r"""Finds for every parameter of a model the stored one that it starts from.

  The first rule that matches a name whole says which: its replacement, in which
  `\1` is what the first group matched, or None for a fresh one. A parameter
  that no rule matches takes the stored one of its own name, unless a rule gave
  that to another.

  Args:
    wanted: names of the model's parameters.
    stored: names in the checkpoint.
    rules: in order, see above.
    fallback_to_scratch: parameters that neither a rule nor a name finds are
      fresh; an error by default.
    name: how messages call the checkpoint.

  Returns:
    `{the model's name: the stored name, or None for a fresh one}`.

  Raises:
    ConfigError: see `check_rules`; a rule that matches nothing first, or whose
      replacement is no name that is stored.
    StructureError: nothing is found for a parameter, or all would be fresh.

  Example:
    >>> rules = [(r'decoder/(.*)', r'old_decoder/\1'), ('head', None)]
    >>> assign(['decoder/w', 'head', 'b'], ['old_decoder/w', 'b'], rules)
    {'decoder/w': 'old_decoder/w', 'head': None, 'b': 'b'}
  """
  check_rules(rules)
  compiled = [
    (tree.expression(pattern, 'restore rule'), to) for pattern, to in rules
  ]
  found, used = {}, set()
  for path in wanted:
    for i, (pattern, replacement) in enumerate(compiled):
      match = pattern.fullmatch(path)
      if match is not None:
        used.add(i)
        found[path] = _source(match, replacement, rules[i], stored, name)
        break
  _check_used(rules, used, wanted)
  taken = {source for source in found.values() if source is not None}
  missing = []
  for path in wanted:
    if path in found:
      continue
    there = path in stored and path not in taken
    found[path] = path if there else None
    if not there:
      missing.append(path)
  if missing and not fallback_to_scratch:
    raise errors.StructureError(
      f'{name} has nothing for {len(missing)} of {len(wanted)} parameters:\n'
      f'{errors.listed(missing)}\nSay where they are, or that they are fresh, '
      'with a rule (NAME, STORED NAME) or (NAME, None); or set '
      'fallback_to_scratch=True, and all that are missing are fresh.'
    )
  if all(source is None for source in found.values()):
    raise errors.StructureError(
      f'Nothing of {name} would be used: all {len(wanted)} parameters would be '
      f'fresh. Names there begin with:\n{errors.listed(list(stored), 5)}\nThose '
      f'of the model with:\n{errors.listed(list(wanted), 5)}\nSay by restore '
      'rules what is where, or start without a checkpoint.'
    )
  return {path: found[path] for path in wanted}


def _source(match, replacement, rule, stored, name):
  if replacement is None:
    return None
  try:
    source = match.expand(replacement)
  except (IndexError, re.error) as error:
    raise errors.ConfigError(
      f'The restore rule {tuple(rule)} has no valid replacement: {error}.'
    ) from error
  if source not in stored:
    near = errors.near(source, stored, 'parameter')
    raise errors.ConfigError(
      f'{match.string} should start from {source!r} by the restore rule '
      f'{tuple(rule)}, which {name} does not have. {near}'
    )
  return source


def _check_used(rules, used, wanted):
  unused = [rules[i][0] for i in range(len(rules)) if i not in used]
  if not unused:
    return
  hint = ''
  if any(pattern.startswith(('target', 'state')) for pattern in unused):
    hint = (
      ' Names are those of parameters: T5X\'s without "target/"; optimizer '
      'state is restored whole, or not at all.'
    )
  raise errors.ConfigError(
    f'{len(unused)} restore rule(s) match no parameter of the model, or only '
    f'what an earlier rule took:\n{errors.listed(unused)}\nAn expression must '
    f'match the whole name.{hint} Parameters begin with:\n'
    f'{errors.listed(list(wanted), 5)}'
  )
