# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and the features of encoder-decoders and language models."""

import os
import pathlib

from google.protobuf import message
import seqio

from mergejax.core import errors
from mergejax.data import noise


def vocabulary(
  name: os.PathLike | str = 'bytes', extra_ids: int | None = None
) -> seqio.Vocabulary:
  """A vocabulary by name or file.

  Args:
    name: `'bytes'` (259 ids: padding, end, unknown, then the bytes), or the
      path of a SentencePiece `.model`.
    extra_ids: sentinels, which span corruption needs: the last ids. A
      SentencePiece model that has so many of its own, as mT5's and T5X's
      `...100extra` have, gets no others. By default none for bytes; for
      SentencePiece those it has, else T5's 100.

  Raises:
    UserError: the file is missing, or no SentencePiece model, or has another
      number of sentinels of its own.
  """
  if str(name) == 'bytes':
    return seqio.ByteVocabulary(extra_ids=extra_ids or 0)
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise errors.DataError(
      f'There is no SentencePiece model at {path}. Give the path of a .model '
      "file, or 'bytes'."
    )
  plain = seqio.SentencePieceVocabulary(str(path), extra_ids=0)
  try:
    inside = noise.num_sentinels(plain)
  except (RuntimeError, message.DecodeError) as error:
    raise errors.DataError(
      f'{path} is no SentencePiece model: {errors.first_line(error)}.'
    ) from error
  if not inside:
    extra_ids = 100 if extra_ids is None else extra_ids
    return seqio.SentencePieceVocabulary(str(path), extra_ids=extra_ids)
  if extra_ids not in (None, 0, inside):
    raise errors.DataError(
      f'The SentencePiece model {path} has {inside} sentinels of its own, to '
      f'which no others are added: give extra_ids={inside}, not {extra_ids}.'
    )
  return plain


def encoder_decoder(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`inputs` and `targets`, both ended by the end token."""
  return {
    'inputs': seqio.Feature(vocab, add_eos=True),
    'targets': seqio.Feature(vocab, add_eos=True),
  }


def language_model(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`targets` alone. The end token is placed per document, before splitting."""
  return {'targets': seqio.Feature(vocab, add_eos=False)}
