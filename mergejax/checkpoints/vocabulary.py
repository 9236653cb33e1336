# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Vocabularies: tokens of a checkpoint, and embedding rows in another order."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import base
from mergejax.core import errors
from mergejax.core import typing

TOKENIZER = 'tokenizer.json'
# What tokenizers say of a token that was added to their vocabulary.
_FLAGS = ('single_word', 'lstrip', 'rstrip', 'normalized', 'special')


def read_tokens(path: str) -> dict[str, int]:
  """`{token: row}` of the `tokenizer.json` of a Hugging Face directory.

  Raises:
    UserError: there is none, or it lists no vocabulary.
  """
  file = pathlib.Path(path).expanduser() / TOKENIZER
  if not file.is_file():
    raise errors.CheckpointError(
      f'{path} has no {TOKENIZER}, so its embedding rows cannot be matched by '
      'token. Save the tokenizer there, or drop `tokenizer` from the recipe.'
    )
  try:
    data = json.loads(file.read_text(encoding='utf-8'))
    vocabulary = data['model']['vocab']
    if isinstance(vocabulary, list):  # unigram models: [token, score]
      tokens = {entry[0]: i for i, entry in enumerate(vocabulary)}
    else:
      tokens = {str(token): int(row) for token, row in vocabulary.items()}
    for entry in data.get('added_tokens') or []:
      tokens[entry['content']] = int(entry['id'])
    return tokens
  except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
    raise errors.CheckpointError(
      f'{file} is not a tokenizer that lists its vocabulary '
      f'({type(error).__name__}: {error}).'
    ) from error


def union(vocabularies: Sequence[Mapping[str, int]]) -> dict[str, int]:
  """All tokens: the first vocabulary as it is, new tokens of others after it."""
  tokens = dict(vocabularies[0])
  row = max(tokens.values(), default=-1) + 1
  for vocabulary in vocabularies[1:]:
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
      if token not in tokens:
        tokens[token] = row
        row += 1
  return tokens


def extended_tokenizer(
  path: str, tokens: Mapping[str, int], donors: Sequence[str] = ()
) -> str:
  """The text of a `tokenizer.json` with tokens it lacks added at their rows.

  Args:
    path: of the model whose tokenizer is extended.
    tokens: `{token: row}` of all that it should have.
    donors: of models that new tokens come from. One that is added there too,
      such as `<|im_end|>`, keeps what is said of it: whether it is special, and
      whether it takes the space around it.

  Returns:
    The text, of the same normalizer, pre-tokenizer and merges.
  """
  file = pathlib.Path(path).expanduser() / TOKENIZER
  data = json.loads(file.read_text(encoding='utf-8'))
  known = read_tokens(path)
  said: dict[str, dict] = {}
  for donor in donors:
    for entry in added_tokens(donor):
      said.setdefault(entry['content'], entry)
  added = list(data.get('added_tokens') or [])
  for token in sorted(set(tokens) - set(known), key=tokens.__getitem__):
    plain = dict.fromkeys(_FLAGS, False)
    entry = {key: said.get(token, plain).get(key, False) for key in _FLAGS}
    added.append({'id': tokens[token], 'content': token, **entry})
  data['added_tokens'] = added
  return json.dumps(data, indent=2, ensure_ascii=False) + '\n'


@dataclasses.dataclass(frozen=True)
class ChosenRow:
  """A row of embeddings that is taken from where a recipe says.

  Attributes:
    row: its number in the result.
    store: whose row it is, or None for zeros.
    at: its number there.
    force: also for models that have a row of their own.
  """

  row: int
  store: base.ParamStore | None
  at: int
  force: bool = False


def added_tokens(path: str) -> list[dict[str, Any]]:
  """What the `tokenizer.json` of a directory says of added tokens, if any."""
  file = pathlib.Path(path).expanduser() / TOKENIZER
  if not file.is_file():
    return []
  return json.loads(file.read_text(encoding='utf-8')).get('added_tokens') or []


class RowsStore(base.ParamStore):
  """A store whose embeddings have their rows in another order and number.

  A row that the store lacks is the `chosen` one, else that of the first of
  `fallbacks` that has it; if there is none, it is the mean of the rows of
  `others` that have it, and zero if nobody does. For task vectors the base
  comes first, so that a token which a model never saw does not move.
  """

  def __init__(
    self,
    store: base.ParamStore,
    rows: Mapping[typing.Path, np.ndarray],
    fallbacks: Sequence[
      tuple[base.ParamStore, Mapping[typing.Path, np.ndarray]]
    ],
    others: Sequence[tuple[base.ParamStore, Mapping[typing.Path, np.ndarray]]],
    chosen: Sequence[ChosenRow] = (),
    padding: int | None = None,
  ):
    """Wraps a store.

    Args:
      store: the store.
      rows: for each embedding <int64>[new rows], its row in the store, or -1.
      fallbacks: `(store, rows)` to take missing rows from, in order.
      others: `(store, rows)` whose mean stands in where no fallback has a row.
      chosen: rows from elsewhere, before any fallback.
      padding: rows from this number on are the mean of those before them.
    """
    self._store = store
    self._rows = rows
    self._fallbacks = fallbacks
    self._others = others
    self._chosen = chosen
    self._padding = padding
    self.tied = store.tied
    self.provenance = store.provenance
    self._specs = {
      path: typing.LeafSpec(
        (len(rows[path]), *spec.shape[1:]), spec.dtype, spec.axes
      )
      if path in rows
      else spec
      for path, spec in store.specs().items()
    }

  def specs(self) -> typing.SpecTree:
    return self._specs

  def stored_dtype(self, path: typing.Path) -> np.dtype:
    return self._store.stored_dtype(path)

  def files(self) -> list[pathlib.Path]:
    return self._store.files()

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    return {
      path: self._aligned(path)
      if path in self._rows
      else self._store.leaves([path])[path]
      for path in paths
    }

  def _aligned(self, path):
    spec = self._specs[path]
    result = np.zeros(spec.shape, spec.dtype)
    missing = np.ones(spec.shape[0], bool)

    def fill(store, rows, allowed):
      take = missing & allowed & (rows[path] >= 0)
      if take.any():
        leaf = np.asarray(store.leaves([path])[path])
        result[take] = leaf[rows[path][take]].astype(spec.dtype)
        missing[take] = False

    own = np.ones(spec.shape[0], bool)
    own[[one.row for one in self._chosen if one.force]] = False
    fill(self._store, self._rows, own)
    for one in self._chosen:
      if missing[one.row] and one.store is not None:
        leaf = np.asarray(one.store.leaves([path])[path])
        result[one.row] = leaf[one.at].astype(spec.dtype)
      missing[one.row] = False
    for store, rows in self._fallbacks:
      fill(store, rows, missing)
    if missing.any() and self._others:
      total = np.zeros((int(missing.sum()), *spec.shape[1:]), np.float32)
      count = np.zeros(int(missing.sum()), np.float32)
      for store, rows in self._others:
        own = rows[path][missing]
        have = own >= 0
        leaf = np.asarray(store.leaves([path])[path])
        total[have] += leaf[own[have]].astype(np.float32)
        count += have
      shape = (-1,) + (1,) * (total.ndim - 1)
      mean = total / np.maximum(count, 1).reshape(shape)
      result[missing] = mean.astype(spec.dtype)
    if self._padding is not None and self._padding < spec.shape[0]:
      known = result[: self._padding].astype(np.float32)
      result[self._padding :] = known.mean(axis=0).astype(spec.dtype)
    return result


class AliasStore(base.ParamStore):
  """A store with a tied parameter shown under its own name too, or left out."""

  def __init__(
    self,
    store: base.ParamStore,
    aliases: Mapping[typing.Path, typing.Path],
    hidden: Collection[typing.Path] = (),
  ):
    self._store = store
    self._aliases = aliases
    self.provenance = store.provenance
    specs = store.specs()
    left = {path: spec for path, spec in specs.items() if path not in hidden}
    self._specs = left | {a: specs[path] for a, path in aliases.items()}

  def specs(self) -> typing.SpecTree:
    return self._specs

  def stored_dtype(self, path: typing.Path) -> np.dtype:
    return self._store.stored_dtype(self._aliases.get(path, path))

  def read_slices(
    self, path: typing.Path, axis: int, first: int, stop: int
  ) -> np.ndarray:
    real = self._aliases.get(path, path)
    return self._store.read_slices(real, axis, first, stop)

  def has_slices(self, path: typing.Path, axis: int) -> bool:
    return self._store.has_slices(self._aliases.get(path, path), axis)

  def window_bytes(self, path: typing.Path) -> int:
    return self._store.window_bytes(self._aliases.get(path, path))

  def files(self) -> list[pathlib.Path]:
    return self._store.files()

  def read_into(self, path: typing.Path, start: int, out: np.ndarray) -> None:
    self._store.read_into(self._aliases.get(path, path), start, out)

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    real = [self._aliases.get(path, path) for path in paths]
    leaves = self._store.leaves(list(dict.fromkeys(real)))
    return {path: leaves[self._aliases.get(path, path)] for path in paths}
