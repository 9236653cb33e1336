# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model says to lines of text."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import seqio

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import decode

# The field of a row that is read; and those that are written.
INPUTS = 'inputs'
_NARROWEST = 16


def read(text: str, source: str, *, json_lines: bool) -> list[dict[str, Any]]:
  """Rows to answer: `{'inputs': text}`, with whatever else they have.

  Args:
    text: one row a line; empty lines at the end do not count.
    source: where it comes from, for messages.
    json_lines: a line is a JSON object with 'inputs', or a JSON string; else
      it is the text itself.

  Raises:
    DataError: a line is not what it should be, or there is none.
  """
  lines = text.rstrip('\n').split('\n') if text.strip() else []
  if not lines:
    raise errors.DataError(f'{source} has no line to answer.')
  if not json_lines:
    return [{INPUTS: line.rstrip('\r')} for line in lines]
  rows = []
  for number, line in enumerate(lines, 1):
    where = f'{source}, line {number}'
    try:
      row = json.loads(line)
    except ValueError as error:
      raise errors.DataError(
        f'{where}: not JSON ({error}). Text as it is goes in a .txt file.'
      ) from error
    row = {INPUTS: row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get(INPUTS), str):
      raise errors.DataError(
        f'{where}: expected {{"{INPUTS}": "some text"}}, got {line[:60]!r}.'
      )
    rows.append(row)
  return rows


def batch_of(
  family: models.ModelFamily,
  tokens: Sequence[Sequence[int]],
  *,
  rows: int,
  end: int = decode.END,
  prefix: bool = False,
) -> dict[str, np.ndarray]:
  """A batch of inputs without targets.

  Args:
    family: of the model.
    tokens: of each input, without an end token.
    rows: of the batch; those beyond the inputs only fill it.
    end: the end token, which encoder-decoders read at the end of their inputs.
    prefix: a decoder-only model reads the inputs as those of tasks, ended and
      seen in both directions; else it goes on with them as text.

  Returns:
    As the family takes it. The width is a power of two, so that there are few
    shapes to compile for.
  """
  plain = decode.is_decoder_only(family)
  ended = prefix or not plain
  tokens = [[*ids, *([end] if ended else [])] for ids in tokens]
  # One place more, where the answer of a decoder-only model begins.
  longest = max(map(len, tokens)) + int(plain)
  width = max(_NARROWEST, 1 << (longest - 1).bit_length())
  given = np.zeros((rows, width), np.int32)
  real = np.zeros((rows, width), np.int32)
  marks = np.zeros((rows, width), np.int32)
  for i, ids in enumerate(tokens):
    given[i, : len(ids)] = ids
    real[i, len(ids) if plain else 0] = 1
    marks[i, : len(ids) + 1] = 1
  if not plain:
    return {
      'encoder_input_tokens': given,
      'decoder_input_tokens': np.zeros((rows, 1), np.int32),
      'decoder_target_tokens': real[:, :1],
    }
  batch = {
    'decoder_input_tokens': np.pad(given, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': given + real,
    'decoder_loss_weights': real,
  }
  return {**batch, 'decoder_causal_attention': marks} if prefix else batch


def decoded(vocabulary: seqio.Vocabulary, tokens: typing.Array) -> str:
  """The text of `<int32>[length]` tokens; 0 after their end is no part of it."""
  return vocabulary.decode(np.trim_zeros(np.asarray(tokens), 'b').tolist())


@dataclasses.dataclass(frozen=True)
class Writer:
  """Answers rows of text, batch by batch.

  Attributes:
    decoder: of the model.
    family: of the model.
    params: of the model.
    vocabulary: of its text.
    batch_size: rows of a batch.
    prefix: see `batch_of`.
    seed: of draws.
    scored: adds `score`.
    every: adds all answers, `predictions` (and `scores`), the best first;
      samples in the order of their draws.
  """

  decoder: decode.Decoder
  family: models.ModelFamily
  params: typing.Tree
  vocabulary: seqio.Vocabulary
  batch_size: int = 32
  prefix: bool = False
  seed: int = 0
  scored: bool = False
  every: bool = False

  def batches(
    self, rows: Sequence[Mapping[str, Any]], first: int = 0
  ) -> Iterator[list[dict[str, Any]]]:
    """Rows with their answers, a list a batch.

    Args:
      rows: from `read`.
      first: how many are answered already; a multiple of `batch_size`.

    Raises:
      DataError: a token that the model does not know.
    """
    for at in range(first, len(rows), self.batch_size):
      part = rows[at : at + self.batch_size]
      tokens = [self.vocabulary.encode(row[INPUTS]) for row in part]
      batch = batch_of(
        self.family, tokens, rows=self.batch_size, prefix=self.prefix
      )
      self.family.check_batch(batch, 'the inputs')
      yield [
        {**row, **said} for row, said in zip(part, self._answers(batch, at))
      ]

  def _answers(self, batch, at):
    key = jax.random.key(self.seed) if self.decoder.method.draws else None
    named: dict[str, Any] = {
      'key': key,
      'rows': np.arange(at, at + self.batch_size, dtype=np.int32),
    }
    if not self.scored and not self.every:
      for row in self.decoder(self.params, batch, **named):
        yield {'prediction': self._text(row)}
      return
    found = self.decoder.answers(self.params, batch, **named)
    best = self.decoder.method.best
    for tokens, scores in zip(*found):
      said = {'prediction': self._text(tokens[best])}
      if self.scored:
        said['score'] = float(scores[best])
      if self.every:
        # The best is first or last; beams that found no answer are left out.
        order = range(len(scores))[:: 1 if best == 0 else -1]
        order = [i for i in order if scores[i] > -np.inf]
        said['predictions'] = [self._text(tokens[i]) for i in order]
        if self.scored:
          said['scores'] = [float(scores[i]) for i in order]
      yield said

  def _text(self, tokens):
    return decoded(self.vocabulary, tokens)
