# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The words of a recipe whose result is an adapter: how it is made.

merge_method: ties
base_model: path/to/base       # what the adapters were trained on
models:
  - model: path/to/adapter-a
  - model: path/to/adapter-b
format: adapter
adapter:
  rank: 16                     # or largest (the default), or exact
  space: delta                 # of LoRA: products, or the factors themselves

The base may be an adapter too: the one that all were begun from.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.adapters import changes
from mergejax.adapters import written
from mergejax.core import errors
from mergejax.merging.recipes import parameters

FORMAT = 'adapter'
_WORDS = ('rank', 'space')
# What is of whole models.
_FOREIGN = (
  'slices', 'modules', 'tokenizer', 'tokenizer_source', 'chat_template',
  'vocab', 'untie',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AdapterWords:
  """How merged adapters become one.

  Attributes:
    rank: of LoRA; see `written.write_changes`.
    space: 'delta', 'factors' or 'vectors'; None for that of the kind.
  """

  rank: int | str = written.LARGEST
  space: str | None = None


def read(data: Mapping[str, Any], report: parameters.Report) -> AdapterWords:
  """Reads `adapter:`; checks that the other words fit `format: adapter`.

  Args:
    data: the recipe, as YAML gave it.
    report: gets every problem.
  """
  own = data.get('adapter')
  if data.get('format') != FORMAT:
    if own is not None:
      report.problems.append(
        "'adapter' says how adapters become one: give `format: adapter` too, or "
        'leave it out to fold each into the base.'
      )
    return AdapterWords()
  for word in _FOREIGN:
    if data.get(word):
      report.problems.append(
        f'{word!r} is of whole models, and the result is an adapter '
        '(`format: adapter`): leave one of the two out.'
      )
  own = {} if own is None else own
  if not parameters.is_mapping(own, _WORDS, 'adapter', report):
    return AdapterWords()
  rank = own.get('rank', written.LARGEST)
  space = own.get('space')
  try:
    written.check_rank(rank)
  except errors.UserError as error:
    report.problems.append(f'adapter: {error.message}')
  known = list(dict.fromkeys(s for all in changes.SPACES.values() for s in all))
  if space is not None and space not in known:
    report.problems.append(errors.near(str(space), known, 'space of adapters'))
  return AdapterWords(rank, space)
