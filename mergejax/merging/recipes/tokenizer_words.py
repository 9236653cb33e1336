# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The `tokenizer:` of a recipe: whose tokens, and where new rows come from.

tokenizer:
  source: union                # base, union, or the path of a model
  pad_to_multiple_of: 64       # rows of the embeddings
  tokens:
    <|im_start|>:
      source: path/to/a        # its row where a model has none
      force: true              # or everywhere
    <pad>:
      source: {kind: zero}
    <|user|>:
      source: {kind: model_token, model: path/to/a, token: <|im_start|>}
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.merging.recipes import model_names
from mergejax.merging.recipes import parameters

_WORDS = ('source', 'tokens', 'pad_to_multiple_of')


@dataclasses.dataclass(frozen=True)
class TokenSource:
  """Where the embedding row of a token comes from.

  Attributes:
    model: the model whose row it is, or None for zeros.
    token: the token there whose row it is, or None.
    row: the number of the row there, or None. Neither: that of the same token.
    force: also for models that have a row of their own.
  """

  model: str | None
  token: str | None = None
  row: int | None = None
  force: bool = False


def read(
  data: Any, report: parameters.Report
) -> tuple[str | None, Mapping[str, TokenSource], int | None]:
  """Reads `tokenizer:`.

  Args:
    data: as YAML gave it.
    report: gets every problem, and what is ignored.

  Returns:
    `(source, {token: source of its row}, rows are a multiple of this)`.
  """
  if not isinstance(data, dict):
    report.problems.append(
      f"'tokenizer' must be `{{source: base|union|PATH}}`, not {data!r}."
    )
    return None, {}, None
  parameters.check_keys(data, _WORDS, 'tokenizer', report)
  multiple = data.get('pad_to_multiple_of')
  if multiple is not None and (type(multiple) is not int or multiple < 1):
    report.problems.append(
      f"tokenizer: 'pad_to_multiple_of' must be a whole number above 0, not "
      f'{multiple!r}.'
    )
    multiple = None
  tokens = data.get('tokens')
  if not isinstance(tokens, (dict, type(None))):
    report.problems.append('tokenizer: tokens must be `TOKEN: {source: ...}`.')
    tokens = None
  found = {
    str(token): _source(str(token), entry, report)
    for token, entry in (tokens or {}).items()
  }
  source = model_names.read(data.get('source', 'union'), 'source', report)
  return source, {t: s for t, s in found.items() if s is not None}, multiple


def _source(token, entry, report):
  where = f'token {token!r}'
  entry = {'source': entry} if isinstance(entry, str) else entry
  if not isinstance(entry, dict) or entry.get('source') is None:
    report.problems.append(f'{where} must be `{{source: PATH, force: false}}`.')
    return None
  parameters.check_keys(entry, ('source', 'force'), where, report)
  force, source = entry.get('force', False), entry['source']
  if not isinstance(force, bool):
    report.problems.append(f'{where}: force must be true or false.')
  if not isinstance(source, dict) or 'kind' not in source:
    return TokenSource(
      model_names.read(source, where, report), force=bool(force)
    )
  if source['kind'] == 'zero':
    return TokenSource(None, force=bool(force))
  row, other = source.get('token_id'), source.get('token')
  good = (
    source['kind'] == 'model_token'
    and 'model' in source
    and (row is None) != (other is None)
    and isinstance(other, (str, type(None)))
    and (row is None or (type(row) is int and row >= 0))
  )
  if not good:
    report.problems.append(
      f'{where}: source must be the path of a model, `{{kind: zero}}`, or '
      '`{kind: model_token, model: PATH, token: TEXT}` (or `token_id: ROW`), '
      f'not {source}.'
    )
    return None
  model = model_names.read(source['model'], where, report)
  return TokenSource(model, other, row, bool(force))
