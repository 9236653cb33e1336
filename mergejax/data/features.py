# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, and the features of encoder-decoders and language models."""

import os
import pathlib

import seqio

from mergejax.core import errors


def vocabulary(name: os.PathLike | str = 'bytes') -> seqio.Vocabulary:
  """A vocabulary by name or file.

  Args:
    name: `'bytes'` (259 ids: padding, end, unknown, then the bytes), or the
      path of a SentencePiece `.model`, to which T5's 100 sentinels are added.

  Raises:
    UserError: the file is missing.
  """
  if str(name) == 'bytes':
    return seqio.ByteVocabulary()
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise errors.DataError(
      f'There is no SentencePiece model at {path}. Give the path of a .model '
      "file, or 'bytes'."
    )
  return seqio.SentencePieceVocabulary(str(path), extra_ids=100)


def encoder_decoder(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`inputs` and `targets`, both ended by the end token."""
  return {
    'inputs': seqio.Feature(vocab, add_eos=True),
    'targets': seqio.Feature(vocab, add_eos=True),
  }


def language_model(vocab: seqio.Vocabulary) -> dict[str, seqio.Feature]:
  """`targets` alone. The end token is placed per document, before splitting."""
  return {'targets': seqio.Feature(vocab, add_eos=False)}
