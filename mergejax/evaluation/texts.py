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
from mergejax.data import splits
from mergejax.data import stream
from mergejax.evaluation import decode

# The field of a row that is read; and those that are written.
INPUTS = 'inputs'
_NARROWEST = 16
# Fields of a task's example that hold the text behind its features.
_TOLD = '_pretokenized'


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


def of_task(
  task: seqio.Task, split: str, lengths: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[list[int]]]:
  """Rows to answer of a task of seqio, in the order of its split.

  Args:
    task: the task.
    split: the split.
    lengths: tokens that its features are cut to.

  Returns:
    `(rows, tokens of their inputs)`. A row is what T5X writes of it,
    `{'inputs': {'inputs_pretokenized': text, ...}}`: the fields of the example
    whose names end so.

  Raises:
    DataError: no example, or one without inputs.
  """
  if INPUTS not in task.output_features:
    raise errors.DataError(
      f'{task.name} has no inputs to answer: its features are '
      f'{", ".join(task.output_features)}.'
    )
  rows, tokens = [], []
  with stream.reporting_bad_rows():
    dataset = splits.in_order(task, split, lengths)
    for example in dataset.as_numpy_iterator():
      told = {
        name: _plain(value)
        for name, value in example.items()
        if name.endswith(_TOLD)
      }
      rows.append({INPUTS: told})
      tokens.append(example[INPUTS].tolist())
  if not rows:
    raise errors.DataError(
      f'The split {split!r} of {task.name} has no example.'
    )
  return rows, tokens


def _plain(value):
  """A value of an example as JSON has it."""
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.ndarray):
    return [_plain(each) for each in value.tolist()]
  return value.item() if isinstance(value, np.generic) else value


def batch_of(
  family: models.ModelFamily,
  tokens: Sequence[Sequence[int]],
  *,
  rows: int,
  end: int | None = decode.END,
  prefix: bool = False,
) -> dict[str, np.ndarray]:
  """A batch of inputs without targets.

  Args:
    family: of the model.
    tokens: of each input, without an end token unless `end` is None.
    rows: of the batch; those beyond the inputs only fill it.
    end: the end token, which encoder-decoders read at the end of their inputs;
      None: the tokens have it, or do without.
    prefix: a decoder-only model reads the inputs as those of tasks, ended and
      seen in both directions; else it goes on with them as text.

  Returns:
    As the family takes it. The width is a power of two, so that there are few
    shapes to compile for.
  """
  plain = decode.is_decoder_only(family)
  if end is not None and (prefix or not plain):
    tokens = [[*ids, end] for ids in tokens]
  # One place more, where the answer of a decoder-only model begins.
  longest = max(map(len, tokens)) + int(plain)
  width = max(_NARROWEST, 1 << (longest - 1).bit_length())
  inputs = np.zeros((rows, width), np.int32)
  for row, ids in zip(inputs, tokens):
    row[: len(ids)] = ids
  return as_batch(family, inputs, np.arange(rows) < len(tokens), prefix=prefix)


def as_batch(
  family: models.ModelFamily,
  inputs: Any,
  answered: Any,
  *,
  prefix: bool = False,
) -> dict[str, Any]:
  """Inputs as a batch that a family takes; of NumPy's arrays, or traceable.

  Args:
    family: of the model.
    inputs: `<int32>[rows, width]` tokens, 0 after their end; of a decoder-only
      model, with room for one more.
    answered: `<bool>[rows]`, False where a row only fills the batch.
    prefix: see `batch_of`.
  """
  xp = inputs.__array_namespace__()
  real = answered.astype(inputs.dtype)[:, None]
  if not decode.is_decoder_only(family):
    return {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': xp.zeros_like(real),
      'decoder_target_tokens': real,
    }
  places = np.arange(inputs.shape[1], dtype=np.int32)[None]
  count = (inputs > 0).astype(inputs.dtype).sum(axis=1, keepdims=True)
  begins = (places == count).astype(inputs.dtype) * real
  batch = {
    'decoder_input_tokens': xp.pad(inputs, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': inputs + begins,
    'decoder_loss_weights': begins,
  }
  if prefix:
    marks = (places <= count).astype(inputs.dtype) * real
    batch['decoder_causal_attention'] = marks
  return batch


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
    self,
    rows: Sequence[Mapping[str, Any]],
    first: int = 0,
    tokens: Sequence[Sequence[int]] | None = None,
  ) -> Iterator[list[dict[str, Any]]]:
    """Rows with their answers, a list a batch.

    Args:
      rows: from `read`.
      first: how many are answered already; a multiple of `batch_size`.
      tokens: of the inputs of every row, as a task gives them; by default those
        of their text, ended where the model reads ended inputs.

    Raises:
      DataError: a token that the model does not know.
    """
    for at in range(first, len(rows), self.batch_size):
      part = rows[at : at + self.batch_size]
      if tokens is None:
        given = [self.vocabulary.encode(row[INPUTS]) for row in part]
      else:
        given = tokens[at : at + self.batch_size]
      batch = batch_of(
        self.family, given, rows=self.batch_size, prefix=self.prefix,
        end=decode.END if tokens is None else None,
      )  # fmt: skip
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
      said: dict[str, Any] = {'prediction': self._text(tokens[best])}
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
