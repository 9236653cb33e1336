# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Single values of a recipe, each checked; what is wrong goes to a report.

Every function takes the value as YAML gave it (None where the recipe is silent)
and returns what the recipe means, or something harmless beside a problem.
"""

from collections.abc import Sequence
from typing import Any

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.merging.recipes import chat_templates
from mergejax.merging.recipes import parameters
from mergejax.merging.recipes import settings

DTYPES = ('float32', 'bfloat16', 'float16', 'float64')


def dtype(computed: Any, stored: Any, report: parameters.Report) -> str | None:
  """The result's dtype from `dtype` and `out_dtype`, of which the second wins.

  Sums are made in float32 whatever it is. `torch.bfloat16` is `bfloat16`.
  """
  found = []
  for value, what in ((computed, 'dtype'), (stored, 'out_dtype')):
    if isinstance(value, str):
      value = value.removeprefix('torch.')
    found.append(choice(value, DTYPES, what, report))
  result = found[1] or found[0]
  if result == 'float64':
    report.remark('float64: sums are made in float32, then widened')
  return result


def chat_template(value: Any, report: parameters.Report) -> str | None:
  """Jinja text, by name too; 'auto' waits until the models are known."""
  if value is None or value == chat_templates.AUTO:
    return value
  if not isinstance(value, str):
    report.problems.append(
      "'chat_template' must be a name or the text of a template, not "
      f'{value!r}.'
    )
    return None
  try:
    return chat_templates.resolve(value)
  except errors.UserError as error:
    report.problems.append(error.message)
    return None


def choice(
  value: Any, choices: Sequence[str], what: str, report: parameters.Report
) -> str | None:
  """One of a few words, or None."""
  if value is not None and value not in choices:
    report.problems.append(errors.near(str(value), choices, what))
    return None
  return value


def flag(value: Any, what: str, report: parameters.Report) -> bool:
  """True or false, see `settings.flag`; false if it is neither."""
  return _converted(settings.flag, value, what, report)


def whole_number(value: Any, what: str, report: parameters.Report) -> int:
  """A number without fraction; 0 if it is none."""
  return _converted(settings.whole_number, value, what, report)


def _converted(convert, value, what, report):
  try:
    return convert(value)
  except ValueError as error:
    report.problems.append(f'{what!r} {error}')
    return convert(0)


def layers(
  value: Any, where: str, report: parameters.Report
) -> tuple[int, int] | None:
  """A half-open range of layers."""
  try:
    first, end = value
    first, end = settings.whole_number(first), settings.whole_number(end)
    if 0 <= first < end:
      return first, end
  except (TypeError, ValueError):
    pass
  report.problems.append(
    f'{where}: layer_range must be [first, end] with 0 <= first < end, not '
    f'{value!r}.'
  )
  return None


def entries(
  value: Any, what: str, form: str, report: parameters.Report
) -> list:
  """A list, empty if there is none; its entries are not looked at."""
  if value is None:
    return []
  if not isinstance(value, list):
    report.problems.append(f'{what!r} must be a list of {form}.')
    return []
  return value


def texts(
  value: Any, what: str, form: str, report: parameters.Report
) -> tuple[str, ...]:
  """A list of words, names or paths, empty if there is none."""
  return tuple(map(str, entries(value, what, form, report)))


def is_expression(text: str, what: str, report: parameters.Report) -> bool:
  """Whether text is a regular expression."""
  try:
    tree_lib.expression(text, what)
    return True
  except errors.UserError as error:
    report.problems.append(error.message)
    return False


def axes(
  value: Any, report: parameters.Report
) -> tuple[tuple[str, tuple[str, ...]], ...]:
  """Logical axes by regular expression of the path."""
  form = '`[regular expression, [axis names]]`'
  rules = []
  for entry in entries(value, 'axes', form, report):
    if (
      not isinstance(entry, list)
      or len(entry) != 2
      or not isinstance(entry[1], list)
    ):
      report.problems.append(f"'axes' must be a list of {form}.")
      continue
    pattern = str(entry[0])
    if is_expression(pattern, 'axes rule', report):
      rules.append((pattern, tuple(map(str, entry[1]))))
  return tuple(rules)
