# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A small decoder-only model of thirteen domains of text, and its data.

A domain's documents are joined, each ended by a token, and cut into full rows.
Needs the data folder in MERGEJAX_DATA.
"""

from collections.abc import Mapping, Sequence
import functools
import os
import pathlib

import flax.linen as nn
import numpy as np
import sentencepiece

from mergejax import models
from mergejax import training
from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.data import corpora
from mergejax.evaluation import metrics

Batch = dict[str, np.ndarray]

PIECES = 1024
LENGTH = 128
BATCH = 16
# Rows of a domain that a model is scored on at once.
SCORED = 32
_END = 1


def _found() -> Mapping[str, Mapping[str, list[pathlib.Path]]]:
  root = os.environ.get('MERGEJAX_DATA')
  if not root:
    raise errors.UserError('Set MERGEJAX_DATA to the data folder first.')
  return corpora.find_domains(pathlib.Path(root) / 'corpora')


def domains() -> list[str]:
  """Names of all domains, sorted."""
  return list(_found())


def _documents(domain: str, split: str):
  for file in _found()[domain][split]:
    yield from corpora.documents(file)


def _lines():
  """The training text of all domains in pieces that the trainer takes."""
  for domain in domains():
    for text in _documents(domain, 'train'):
      for begin in range(0, len(text), 1000):
        yield text[begin : begin + 1000]


@functools.cache
def vocabulary(cache: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
  """SentencePiece of the training text, trained once; it loses no byte."""
  path = cache / f'pieces_{PIECES}.model'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with files_lib.atomic_path(path) as temporary, open(temporary, 'wb') as out:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(), model_writer=out, vocab_size=PIECES,
        pad_id=0, eos_id=_END, unk_id=2, bos_id=-1, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False,
        remove_extra_whitespaces=False, input_sentence_size=8000,
        shuffle_input_sentence=True, num_threads=1, minloglevel=2,
      )  # fmt: skip
  return sentencepiece.SentencePieceProcessor(model_file=str(path))


@functools.cache
def _bytes_of(cache: pathlib.Path) -> np.ndarray:
  """`<int32>[pieces]` UTF-8 bytes of each piece; an end has none."""
  pieces = vocabulary(cache)

  def size(piece):
    if pieces.is_byte(piece):
      return 1
    if pieces.is_control(piece):
      return 0
    return len(pieces.id_to_piece(piece).replace('\u2581', ' ').encode())

  return np.array([size(i) for i in range(PIECES)], np.int32)


def rows(
  domain: str, split: str, cache: pathlib.Path, most: int | None = None
) -> np.ndarray:
  """The text of a domain as rows of tokens, none of them padding.

  Args:
    domain: of `domains`.
    split: 'train', 'validation' or 'test'.
    cache: keeps the vocabulary and the tokens.
    most: rows, evenly spread over the split; by default all.

  Returns:
    `<int32>[rows, LENGTH]`.
  """
  path = cache / f'rows_{PIECES}_{LENGTH}' / f'{domain}_{split}.npy'
  if not path.exists():
    pieces = vocabulary(cache)
    tokens = [
      token
      for text in _documents(domain, split)
      for token in (*pieces.encode(text), _END)
    ]
    count = len(tokens) // LENGTH
    cut = np.array(tokens[: count * LENGTH], np.int32).reshape(count, LENGTH)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files_lib.atomic_path(path) as temporary:
      with open(temporary, 'wb') as out:
        np.save(out, cut)
  found = np.load(path)
  if most is None or most >= len(found):
    return found
  return found[np.linspace(0, len(found) - 1, most).astype(int)]


def as_batch(tokens: np.ndarray) -> Batch:
  """Rows `<int32>[rows, LENGTH]` under the names that the family reads."""
  return {
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': tokens,
  }


def stream(
  parts: Sequence[np.ndarray], batch: int = BATCH, seed: int = 0
) -> training.ArrayStream:
  """Shuffled batches without end of the rows of some domains together."""
  return training.ArrayStream(as_batch(np.concatenate(parts)), batch, seed=seed)


def scored(tokens: np.ndarray, cache: pathlib.Path) -> list[Batch]:
  """Rows in batches of equal size, with the bytes of each row.

  The last batch is filled with empty rows.
  """
  tokens = np.pad(tokens, ((0, -len(tokens) % SCORED), (0, 0)))
  found = {**as_batch(tokens), 'num_bytes': _bytes_of(cache)[tokens].sum(1)}
  return [
    {name: leaf[begin : begin + SCORED] for name, leaf in found.items()}
    for begin in range(0, len(tokens), SCORED)
  ]


def module(**more) -> nn.Module:
  """A language model of two layers and 0.66 million parameters.

  Args:
    **more: fields of `lm.LMConfig` that are otherwise.
  """
  sizes = dict(
    model_type='lm', vocab_size=PIECES, emb_dim=128, num_heads=4, head_dim=32,
    num_layers=2, mlp_dim=512, mlp_activations=('relu',),
  )  # fmt: skip
  return models.build({**sizes, **more})


class BitsPerByte:
  """Scores parameters on rows of a domain; the program is compiled once."""

  def __init__(self, the_module: nn.Module):
    self._scorer = metrics.make_scorer(the_module, 'bits_per_byte')

  def __call__(self, params, batches: Sequence[Batch]) -> float:
    """Of batches from `scored`: `-sum log2 p(token) / bytes`."""
    values, counts = self._scorer(params, batches)
    return float(metrics.score(values, counts, 'bits_per_byte').value)
