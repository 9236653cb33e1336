# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and the features of encoder-decoders and language models."""

import os
import pathlib

import seqio

from mergejax.core import errors


def vocabulary(
  name: os.PathLike | str = 'bytes', extra_ids: int | None = None
) -> seqio.Vocabulary:
  """A vocabulary by name or file.

  Args:
    name: `'bytes'` (259 ids: padding, end, unknown, then the bytes), or the
      path of a SentencePiece `.model`.
    extra_ids: sentinels after the last id, which span corruption needs; by
      default none for bytes, T5's 100 for SentencePiece. mT5's model has them
      inside: 0.

  Raises:
    UserError: the file is missing.
  """
  if str(name) == 'bytes':
    return seqio.ByteVocabulary(extra_ids=extra_ids or 0)
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise errors.DataError(
      f'There is no SentencePiece model at {path}. Give the path of a .model '
      "file, or 'bytes'."
    )
  extra_ids = 100 if extra_ids is None else extra_ids
  return seqio.SentencePieceVocabulary(str(path), extra_ids=extra_ids)


def encoder_decoder(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`inputs` and `targets`, both ended by the end token."""
  return {
    'inputs': seqio.Feature(vocab, add_eos=True),
    'targets': seqio.Feature(vocab, add_eos=True),
  }


def language_model(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`targets` alone. The end token is placed per document, before splitting."""
  return {'targets': seqio.Feature(vocab, add_eos=False)}
