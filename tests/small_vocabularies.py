# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small SentencePiece models, trained while tests run."""

import io
import pathlib

import sentencepiece


def pieces(folder, size=45, **options):
  """A SentencePiece model of a few words, in T5's layout."""
  model = io.BytesIO()
  words = ['the cat sat on the mat', 'a fine naive full text', 'mat cat'] * 20
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(words), model_writer=model, vocab_size=size,
      pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=9,
      hard_vocab_limit=False, **options,
  )  # fmt: skip
  path = pathlib.Path(folder) / 'pieces.model'
  path.write_bytes(model.getvalue())
  return path
