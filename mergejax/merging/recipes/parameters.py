# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters of a recipe: known options, of their kinds, where they count."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergejax.core import errors
from mergejax.merging.recipes import mergekit_words
from mergejax.merging.recipes import settings
from mergejax.methods import edits
from mergejax.methods import entries as methods_lib
from mergejax.methods import named


class Report:
  """What is wrong with a recipe, and what of it does not count.

  Attributes:
    problems: every mistake, in words.
  """

  def __init__(self):
    self.problems: list[str] = []
    self._ignored: dict[tuple[str, str], list[str]] = {}
    self._remarks: list[str] = []

  def remark(self, text: str) -> None:
    """Remembers a choice that the plan will tell."""
    self._remarks.append(text)

  def ignore(self, key: Any, where: str, why: str) -> None:
    """Remembers a key that changes nothing; the plan will tell."""
    places = self._ignored.setdefault((str(key), why), [])
    if where not in places:
      places.append(where)

  def notes(self) -> tuple[str, ...]:
    """One line for every choice, and for every ignored key."""
    return (
      *dict.fromkeys(self._remarks),
      *(
        f'ignored: {key!r} in {errors.some(places)}: {why}'
        for (key, why), places in self._ignored.items()
      ),
    )


def check_keys(
  data: Mapping[Any, Any],
  known: Sequence[str],
  where: str,
  report: Report,
  misplaced: Collection[str] = (),
) -> None:
  """Tells of keys that are not known: slips are wrong, others are ignored.

  Args:
    data: a mapping of the recipe.
    known: the keys it may have.
    where: what it is, for messages.
    report: gets the problems, and what is ignored.
    misplaced: keys that have a meaning in `parameters:` only.
  """
  for key in data:
    if key in known:
      continue
    if key in misplaced and key == 'weight':
      report.problems.append(
        f'{where}: weight belongs below `parameters:`; here nobody reads it.'
      )
    elif key in misplaced:
      report.ignore(key, where, 'it counts below `parameters:` only')
    elif close := mergekit_words.slip(key, known):
      report.problems.append(
        f'unknown key {key!r} in the {where}. Did you mean {close!r}? Known: '
        f'{", ".join(known)}.'
      )
    else:
      report.ignore(key, where, 'unknown, and mergekit ignores it')


def is_mapping(
  data: Any, known: Sequence[str] | None, what: str, report: Report
) -> bool:
  """True if something is `key: value` lines, whose keys `check_keys` checks.

  Args:
    data: as YAML gave it.
    known: the keys it may have; None for any.
    what: what it is, for messages.
    report: gets the problems, and what is ignored.
  """
  if not isinstance(data, dict):
    report.problems.append(f'the {what} must be `key: value` lines.')
    return False
  if known is not None:
    check_keys(data, known, what, report, mergekit_words.OPTIONS)
  return True


def read(
  data: Any,
  method: methods_lib.MethodEntry | None,
  where: str,
  report: Report,
  *,
  of_model: bool,
) -> Mapping[str, Any]:
  """The `parameters:` of a recipe, a slice, a rule or a model.

  Args:
    data: as YAML gave it.
    method: what is known of the method, or None.
    where: what these are the parameters of, for messages.
    report: gets every problem, and what is ignored.
    of_model: they are those of one model.

  Returns:
    `{option by its name in Python: setting}`, of the option's kind.
  """
  if data is None:
    return {}
  if not is_mapping(data, None, where, report):
    return {}
  result = {}
  for key, value in data.items():
    if method is None or not _counts(key, value, method, where, report, of_model):  # fmt: skip
      continue
    name, kind, convert = _meaning(key, method)
    value, problem = settings.read(value, kind, convert)
    if problem:
      report.problems.append(f'{where}: {key}: {problem}')
    elif name in result:
      report.problems.append(f'{where}: {key} and {name} are the same option.')
    else:
      result[name] = value
      if settings.is_gradient(value):
        report.remark(
          'gradients run along the layers; outside of them (embeddings, final '
          'norm, head) their first value counts, as in mergekit'
        )
  return result


def _counts(key, value, method, where, report, of_model) -> bool:
  """True if a key is an option here; otherwise the report has heard of it."""
  own = method.options
  if method.name in mergekit_words.READS:
    per_model, for_all = mergekit_words.READS[method.name]
    # What is not in Python by this name, or is there and not in mergekit.
    known = key in (*per_model, *for_all) or (
      key in own and key not in mergekit_words.OPTIONS
    )
  else:
    per_model, for_all = (), ()
    known = (
      key == 'weight' or mergekit_words.OPTION_ALIASES.get(key, key) in own
    )
  why = None
  if value == []:
    why = 'an empty list gives nothing'
  elif key == 'scale' and key in own and not known:
    report.problems.append(
      f'{where}: scale: mergekit ignores it under {method.name}. Write `lambda` if '
      'that is meant; otherwise take it out.'
    )
  elif (
    method.name == 'task_arithmetic'
    and key in mergekit_words.WHOLE_TASK_VECTORS
  ):
    why = 'task_arithmetic keeps task vectors whole, as in mergekit'
  elif key in mergekit_words.WITHOUT_EFFECT:
    why = mergekit_words.WITHOUT_EFFECT[key]
  elif of_model and key in for_all:
    why = (
      f'{method.name} takes one for all models, from the common `parameters:`'
    )
  elif known:
    return True
  elif key in mergekit_words.OPTIONS and not (method.is_value or method.source):
    why = f'{method.name} does not read it, as in mergekit'
  else:
    _unknown(key, method, where, report)
  if why:
    report.ignore(key, where, why)
  return False


def _unknown(key, method, where, report):
  """An option that neither this method nor mergekit knows."""
  known = {*map(method.recipe_name, method.options), 'weight'}
  ours = {o for other in named.METHODS for o in named.METHODS.options(other)}
  foreign = method.is_value or method.source is not None
  if (
    foreign
    or key in ours
    or mergekit_words.slip(key, known | mergekit_words.OPTIONS)
  ):
    report.problems.append(
      errors.near(str(key), known, f'option of {method.name} in {where},')
    )
  else:
    report.ignore(key, where, 'unknown, and mergekit ignores it')


def _meaning(key, method):
  """`(name in Python, kind, what converts a value, None for the kind's)`."""
  name = mergekit_words.OPTION_ALIASES.get(key, key)
  if key == 'nuslerp_row_wise':
    return (
      name,
      'flag',
      lambda value: 'input_feature' if settings.flag(value) else 'output_unit',
    )
  if key == 'rescale':
    return name, 'word', _rescale
  if name == 'weight':
    return name, 'number', None
  return name, method.options[name].kind, None


def _rescale(value):
  """mergekit's flag, or one of our words."""
  if value in edits.RESCALES:
    return value
  try:
    return 'l1' if settings.flag(value) else 'none'
  except ValueError:
    raise ValueError(
      errors.near(str(value), ['true', 'false', *edits.RESCALES], 'rescale')
    ) from None
